"""What experiments/speed.py says of its rows, and of the peers' beside them."""
import json
import statistics

from experiments.common.results import HERE


def peers() -> list[dict]:
    """Rows of peers.json: net, batch, block, rule (a threshold without its level), peer, forwards, and how many times
    as fast ours was in the same turns; none where nobody has taken them."""
    file = HERE / "speed" / "peers.json"
    return json.loads(file.read_text())["rows"] if file.exists() else []


def spread(values: list[float]) -> str:
    """Median (smallest to largest)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(results: dict, others: list[dict]) -> str:
    """Markdown: a row a network, batch, block and rule. Peers' code as it is; with copies made free: in the file."""
    names = [name for name in dict.fromkeys(row["peer"] for row in others) if "copies free" not in name]
    lines = ["| network, batch, block, rule | tokens/s | forwards of N | times as fast as AR |"
             + "".join(f" as {name} |" for name in names), "|" + "---|" * (4 + len(names))]
    found = {(other["peer"], *key_of(other)): spread(other["faster"]) for other in others}
    for row in results["rows"]:
        net, batch, block, kind = key = key_of(row)
        cells = [f"{net}, {batch}, {block}, {kind}", f"{statistics.median(row['tok_s']):.0f}",
                 f"{row['forwards']} of {row['tokens']}", spread(row["over_ar"])]
        lines.append(f"| {' | '.join(cells + [found.get((name, *key), '-') for name in names])} |")
    return "\n".join(lines)


def key_of(row: dict) -> tuple:
    """Network, batch, block and rule, of a threshold without its level."""
    rule = row["rule"]
    return row["net"], row["batch"], row["block"], rule if rule.startswith("static") else rule.partition(":")[0]


def draw(results: dict, figure) -> None:
    """Times as fast as AR."""
    axes, rows = figure.subplots(), results["rows"][::-1]
    axes.barh([f"{row['net']}, batch {row['batch']}, block {row['block']}, {row['rule']}" for row in rows],
              [statistics.median(row["over_ar"]) for row in rows])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.tick_params(labelsize=6)
    axes.set_xlabel("tokens a second over those of AR with its cache")
