"""Tables."""


def write(output) -> str:
    return ""
