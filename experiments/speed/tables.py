"""Table, picture and page of the sampler's speed, and the samplers of other projects beside it."""
import statistics

from experiments.common import page as md
from experiments.common.plots import series_style
from experiments.common.results import markdown_table, median_range

TITLE = "How fast the sampler is"
SUMMARY = (
    "Tokens per second beside AR with its cache, and beside the samplers of dllm, OPDLM's release and SDAR"
)
RELEASE = "OPDLM's release"
NO_COPIES = ", copies free"     # ends the name of a peer whose copies of its cache were made to cost nothing


def key_of(row: dict) -> tuple:
    """Network, batch, block size and rule; of a threshold without its value."""
    rule = row["rule"]
    if not rule.startswith("static"):
        rule = rule.partition(":")[0]
    return row["net"], row["batch"], row["block"], rule


def table(results: dict, peers: list[dict]) -> str:
    """Markdown: one row per network, batch, block size and rule; peers' code as it is."""
    names = [name for name in dict.fromkeys(row["peer"] for row in peers) if NO_COPIES not in name]
    faster = {(row["peer"], *key_of(row)): median_range(row["faster"]) for row in peers}
    header = ["network, batch, block, rule", "tokens/s", "forward passes for N tokens", "times as fast as AR"]
    header += [f"as {name}" for name in names]
    rows = []
    for row in results["rows"]:
        key = key_of(row)
        cells = [
            ", ".join(map(str, key)),
            f"{statistics.median(row['tok_s']):.0f}",
            f"{row['forwards']} of {row['tokens']}",
            median_range(row["over_ar"]),
        ]
        rows.append(cells + [faster.get((name, *key), "-") for name in names])
    return markdown_table(header, rows)


def plot(results: dict, figure) -> None:
    """Times as fast as AR: one panel per network."""
    nets = list(dict.fromkeys(row["net"] for row in results["rows"]))
    panels = figure.subplots(1, len(nets), sharex=True, squeeze=False)[0]
    figure.set_size_inches(5.5 * len(nets) + 1, 5.6)
    for axes, net in zip(panels, nets):
        rows = [row for row in results["rows"] if row["net"] == net][::-1]
        labels = [", ".join(map(str, key_of(row)[1:])) for row in rows]
        for y, row in enumerate(rows):
            rule = key_of(row)[3]
            style = series_style({"static:1": 0, "threshold": 1}.get(rule, 2)) | {"linestyle": "none"}
            median = statistics.median(row["over_ar"])
            error = [[median - min(row["over_ar"])], [max(row["over_ar"]) - median]]
            axes.errorbar(median, y, xerr=error, capsize=3, **style)
        axes.set_yticks(range(len(rows)), labels)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(xlabel="tokens per second / AR's", title=net)
    panels[0].set_ylabel("batch, block, rule")
    figure.suptitle(
        "Speed relative to AR with its cache, one CPU thread (median, smallest and largest of the turns)"
    )


PLOTS = {"cpu": plot}


def page(all_results: dict[str, dict]) -> str:
    results = all_results["cpu"]
    peers = all_results["cpu_peers"]
    return md.join(
        f"# {TITLE}",
        md.paragraph("""
            Block diffusion itself: random networks under the paper's layout (`--align=paper
            --context=block`), greedy, 272 tokens after a prompt of 16, one CPU core. "threshold" is set to
            two tokens per forward pass. AR is a loop with a cache that does nothing else. The last three
            columns compare with the unchanged samplers of other projects on the same network, in other turns.
            Medians of five turns (smallest to largest); above 1 this sampler is faster; "-" where a peer has
            no such rule or takes one row only."""),
        md.measured(results, "cpu", "twenty minutes on one CPU core"),
        md.paragraph(f"""
            Peers: method and commits are in [results/cpu_peers.json](results/cpu_peers.json).
            {peers['parity']['same_tokens']} of {peers['parity']['cases']} greedy texts that were compared
            have the same tokens."""),
        md.details("All rows", table(results, peers["rows"])),
        md.picture("cpu", "Tokens per second relative to AR, by network, batch, block and rule"),
        "## What was found",
        md.bullets(findings(results, peers)),
    )


def findings(results: dict, peers: dict) -> list[str]:
    over_ar = {key_of(row): statistics.median(row["over_ar"]) for row in results["rows"]}
    one_token = [value for key, value in over_ar.items() if key[3] == "static:1"]
    four_tokens = {key: value for key, value in over_ar.items() if key[3] == "static:4"}
    wins = [f"{', '.join(map(str, key))} ({value:.2f})" for key, value in over_ar.items() if value > 1]

    def speedup(peer: str, batch: int) -> str:
        medians = []
        for row in peers["rows"]:
            if row["peer"] == peer and row["batch"] == batch:
                medians.append(statistics.median(row["faster"]))
        return f"{min(medians):.2f} to {max(medians):.2f}"

    def milliseconds(whose: str, part: str) -> str:
        values = [row[part] / 1000 for row in peers["microseconds"]["rows"] if row["whose"] == whose]
        low, high = f"{min(values):.1f}", f"{max(values):.1f}"
        return low if low == high else f"{low} to {high}"

    return [
        "N tokens, one per step, take N forward passes, prompt and commits included.",
        f"One token per step is slower than AR everywhere ({min(one_token):.2f} to {max(one_token):.2f} of "
        "its speed): on one core a forward pass costs about what its positions cost, and each has a whole "
        "block of them.",
        f"Faster than AR are only: {'; '.join(wins)}. At batch 32 four tokens per step are "
        f"{four_tokens['small, 4 x 128', 32, 16, 'static:4']:.2f} of AR's speed in the small network and "
        f"{four_tokens['wide, 6 x 384', 32, 16, 'static:4']:.2f} in the wide one.",
        f"Beside peers, small network, 32 rows at once: {speedup(RELEASE, 32)} times as fast as OPDLM's "
        f"release ({speedup(RELEASE + NO_COPIES, 32)} if its copies of the cache cost nothing), "
        f"{speedup('dllm', 32)} times as fast as dllm.",
        f"One row: {speedup(RELEASE, 1)} times the release's speed ({speedup(RELEASE + NO_COPIES, 1)} "
        f"without its copies), and {speedup('SDAR', 1)} times that of SDAR's loop, which takes no more than "
        f"one row. SDAR does {milliseconds('SDAR', 'beside')} ms of work outside a forward pass, this "
        f"sampler {milliseconds('ours', 'beside')} ms, since it handles rows whose blocks begin and end "
        f"apart; a forward pass is {milliseconds('ours', 'within')} ms.",
    ]
