"""What each stage of ``make gpu`` does, inside the stage's own process.

``benchmarks.gpu.stage`` imports one stage at a time: a kernel's build or a sanitizer must not wait
for what others need. It must not import the processes, the claims or the command around them.
"""
