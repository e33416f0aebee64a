"""Tables and page of the conversion of a real checkpoint."""
import statistics

from experiments.common import page as md
from experiments.common.results import markdown_table, median_range

TITLE = "A real checkpoint, converted"
SUMMARY = "SmolLM2-135M-Instruct, converted with an adapter on text that it writes itself"
PLOTS = {}
SHOWN = ("AR", "self-verified", "leftmost:0.9")     # in the samples
OTHERS = (              # as their papers report them, not measured here
    ["GPT-2 small to DiffuGPT-S ([2410.17891](https://arxiv.org/abs/2410.17891))", "127M",
     "about 130B tokens", "LAMBADA 45.0 (GPT-2: 25.9), HellaSwag 33.4 (29.9), PIQA 57.7 (62.1)"],
    ["BD3-LM, from scratch, blocks of 4 ([2503.09573](https://arxiv.org/abs/2503.09573))", "110M",
     "65B tokens of LM1B", "perplexity at most 28.23 (AR: 22.83), 0.21 nats per token more"],
)


def same_answers(results: dict, way: str) -> float:
    """The share of prompts whose answer is the greedy AR model's, token for token."""
    ours = results["texts"][way]["responses"]
    ar = results["texts"]["AR"]["responses"]
    same = [a == b for kind in ar for a, b in zip(ours[kind], ar[kind], strict=True)]
    return statistics.mean(same)


def table(results: dict) -> str:
    """Markdown: a row per way of writing."""
    rows = []
    for way, numbers in results["texts"].items():
        total = numbers["all"]
        same = "" if "temperature" in way else f"{same_answers(results, way):.3f}"
        cells = [f"{total['tok_per_fwd']:.2f}", f"{total['positions_per_tok']:.1f}"]
        cells += [f"{total['agreement']:.3f}", same, f"{total['gen_nats']:.3f}", f"{total['distinct2']:.3f}"]
        rows.append([way, *cells])
    header = ["", "tokens per forward pass", "positions per token", "agreement", "same answer",
              "`gen_nats`", "`distinct2`"]
    return markdown_table(header, rows)


def kinds_table(results: dict) -> str:
    """Tokens per forward pass by kind of prompt."""
    ways = [way for way in results["texts"] if "self-verified" in way]
    rows = []
    for kind in results["texts"]["AR"]["kinds"]:
        cells = [f"{results['texts'][way]['kinds'][kind]['tok_per_fwd']:.2f}" for way in ways]
        rows.append([kind, *cells])
    return markdown_table(["", *ways], rows)


def likelihood_table(results: dict) -> str:
    rows = []
    for kind, numbers in results["likelihood"].items():
        cells = [f"{numbers[way]['bits_per_byte']:.4f}" for way in ("ar", "student_ar", "blocks")]
        rows.append([kind, *cells])
    return markdown_table(["bits per byte", "AR model", "student as AR model", "student in its blocks"], rows)


def speed_table(results: dict) -> str:
    seconds = results["seconds_per_token"]
    rows = [[way, median_range([1000 * x for x in turns], 1)] for way, turns in seconds.items()]
    return markdown_table(["", "milliseconds per token"], rows)


def speedup(results: dict, way: str = "self-verified") -> float:
    """The AR loop's time per token over that of the student: the median of the turns."""
    seconds = results["seconds_per_token"]
    return statistics.median(ar / ours for ar, ours in zip(seconds["AR"], seconds[way]))


def samples(results: dict) -> str:
    parts = []
    for sample in results["samples"]:
        lines = [f"**{sample['prompt']}**", ""]
        for way in SHOWN:
            text = " ".join(sample["written"][way].split()).replace("|", "/").replace("<", "&lt;")
            lines.append(f"- {way}: {text}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def page(all_results: dict[str, dict]) -> str:
    if not all_results:
        command = "python -m experiments.real.run --data=FILE.txt --val_data=FILE.txt"
        return md.join(f"# {TITLE}", "**Not measured yet.** The command:", f"```bash\n{command}\n```")
    results = all_results["smollm2"]
    options = results["options"]
    conversion = results["conversion"]
    return md.join(
        f"# {TITLE}",
        md.paragraph(f"""
            SmolLM2-135M-Instruct, {results['parameters'] / 1e6:.1f} million parameters in Llama's layout,
            becomes a student with an adapter of rank {options['lora']} ({results['trained'] / 1e6:.1f}
            million trained parameters; [docs/lora.md](../../docs/lora.md)). It learns on its own greedy
            text alone: the prompts are 1 to 16 tokens of TinyStories and of Python's language reference,
            what follows them is the checkpoint's. One run, one seed."""),
        md.measured(results, "smollm2", duration(conversion)),
        md.paragraph(f"""
            {options['updates']} updates of two rows, {conversion['loss_positions'] / 1000:.0f}k positions
            in the loss, {conversion['train_flops']:.2g} FLOPs."""),
        "## What it writes",
        md.paragraph(f"""
            240 prompts that were not trained on (facts, opposites, definitions, openings, sums), up to
            {options['answer']} tokens after each, greedy unless a temperature is named. `agreement` is the
            share of tokens that are the AR model's most likely one after the text so far; *same answer* is
            the share of prompts whose whole answer is the greedy AR model's. The prompt's first pass counts
            too."""),
        table(results),
        "Tokens per forward pass by kind of prompt:",
        kinds_table(results),
        "## Likelihood of held-out text",
        md.paragraph(f"""
            {options['texts']} TinyStories and as many docstrings of Python's library, cut after
            {options['tokens']} tokens. In its blocks the student is scored from left to right, one token at
            a time."""),
        likelihood_table(results),
        "## Seconds",
        md.paragraph(f"""
            Ten of the prompts, one at a time, greedy, up to {2 * options['answer']} tokens,
            {options['threads']} threads; median (smallest to largest) of {options['turns']} turns. AR is a
            loop with a cache that does nothing else."""),
        speed_table(results),
        "## What was found",
        md.bullets(findings(results)),
        "## Beside what others report",
        others_table(results),
        md.paragraph("""
            Only the distance to the AR model in likelihood can be compared, and roughly: other text, another
            unit, and BD3-LM's perplexity is a bound while this page scores by the chain rule from left to
            right. Token counts cannot: DiffuGPT and BD3-LM are models that write by diffusion alone, with all
            weights trained; here an adapter is trained, and the frozen AR model can verify every token. Nor
            can LAMBADA: DiffuGPT reads the text on both sides of a word, this student answers as its AR
            model does."""),
        md.details("Samples: the first prompts of each kind", samples(results)),
    )


def others_table(results: dict) -> str:
    """Markdown: what others report for models of this size, and this page's row."""
    conversion = results["conversion"]
    row = ["this page", f"{results['parameters'] / 1e6:.1f}M",
           f"{conversion['loss_positions'] / 1000:.0f}k positions",
           f"{' and '.join(more_bits(results))} than AR; as an AR model unchanged"]
    return markdown_table(["", "parameters", "trained on", "reported"], [*OTHERS, row])


def more_bits(results: dict) -> list[str]:
    """By kind of text: the student in its blocks, minus the AR model."""
    found = []
    for kind, numbers in results["likelihood"].items():
        difference = numbers["blocks"]["bits_per_byte"] - numbers["ar"]["bits_per_byte"]
        found.append(f"{difference:.3f} more bits per byte ({kind})")
    return found


def duration(conversion: dict) -> str:
    minutes = conversion["seconds"] / 60
    return f"{minutes:.0f} minutes for the conversion, on one busy core, and then about a quarter of an hour"


def findings(results: dict) -> list[str]:
    ways = results["texts"]
    before = "self-verified before training"
    shorter = "self-verified, blocks of 2"

    def speed(way: str) -> str:
        return f"{ways[way]['all']['tok_per_fwd']:.2f}"

    def saved(way: str) -> str:
        return f"{1 - 1 / ways[way]['all']['tok_per_fwd']:.0%}"

    def agreement(way: str) -> str:
        return f"{ways[way]['all']['agreement']:.1%}"

    faster = speedup(results)
    verdict = "faster" if faster > 1.05 else "**not faster**"
    positions = ways["self-verified"]["all"]["positions_per_tok"]
    return [
        f"Verified by itself the student writes {speed('self-verified')} tokens per forward pass, greedily: "
        f"{saved('self-verified')} fewer passes than AR. With an untrained adapter it is {speed(before)}, "
        f"{saved(before)} fewer passes. At temperature 0.7 the student writes "
        f"{speed('self-verified, temperature 0.7')}.",
        "**This is little.** The conversion is short, its prompts are of other kinds than these, and an "
        "answer of a few tokens cannot gain: the first pass reads the prompt and drafts nothing.",
        f"{same_answers(results, 'self-verified'):.1%} of these answers are the AR model's, token for token. "
        "Drafts are verified by the frozen AR model, so this holds before training too "
        f"({same_answers(results, before):.1%}): it says that nothing was lost, not that something was "
        "learned.",
        f"By a reveal rule, without a verifier, {agreement('leftmost:0.9')} of the tokens are the AR model's "
        f"choice with leftmost:0.9, at {speed('leftmost:0.9')} tokens per forward pass, and "
        f"{agreement('static:2')} with static:2, at {speed('static:2')}.",
        f"In its blocks the student's held-out text takes {' and '.join(more_bits(results))} than the AR "
        "model's. As "
        "an AR model it is the checkpoint.",
        f"In seconds at batch 1 it is {faster:.2f} times as fast as the AR loop, which is {verdict}: it "
        f"processes {positions:.1f} positions per token.",
        f"Decoded in blocks of 2 the same student writes {speed(shorter)} tokens per forward pass with "
        f"{ways[shorter]['all']['positions_per_tok']:.1f} positions per token, and is "
        f"{speedup(results, shorter):.2f} times as fast as AR: on a CPU a pass over fewer positions saves "
        "more time than its missing drafts cost.",
    ]
