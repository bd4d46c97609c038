"""The goals of the benchmarks: each is printed as a line that says if it was missed."""


def goal(what: str, value: float, unit: str = "", least: float = float("-inf"), most: float = float("inf")) -> bool:
    """Print the figure beside its goal, if it has one; whether it was met."""
    met = least <= value <= most
    wanted = f"at least {least:g}" if least > float("-inf") else f"at most {most:g}" if most < float("inf") else ""
    print(f"{what:<62} {value:8.3g} {unit:<6} {wanted:<14} {'' if met else 'MISSED'}".rstrip(), flush=True)
    return met
