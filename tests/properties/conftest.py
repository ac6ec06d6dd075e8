"""How many examples: 50 of each property, always the same ones; CONR_EXAMPLES of new ones where it
is set. Triton's interpreter gets one for 25 of them, or two that are chosen.
"""

import os

from hypothesis import HealthCheck, Phase, settings

from conr_kernels.triton_backend.availability import interpreted

ASKED = os.environ.get("CONR_EXAMPLES")
EXAMPLES = int(ASKED or 50)

settings.register_profile(
    "conr",
    max_examples=max(EXAMPLES // 25, 1) if interpreted() else EXAMPLES,
    derandomize=ASKED is None,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("conr")
