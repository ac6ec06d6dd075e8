"""Does ConR help deep imbalanced regression, and what does it cost?"""
