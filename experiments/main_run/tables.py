"""Tables and page of the main run."""
import statistics

from experiments.common import page as md
from experiments.common.results import markdown_table, mean_range
from report import compare

TITLE = "The main run: pretrain, convert, distil, compare"
SUMMARY = "`python train_tiny.py` over several seeds: the teacher, the student before and after distillation"
ROWS = {
    "val_nats": "nats/token", "bits_per_byte": "bits", "gen_nats": "nats/token", "valid": "share",
    "broken": "laws/story", "recovery": "ratio", "agreement": "share", "distinct2": "share",
    "entropy": "nats", "tok_per_fwd": "tokens", "bytes_per_fwd": "bytes", "positions_per_tok": "positions",
}
MODELS = {
    "ar": "AR teacher", "before": "student before", "after": "student after",
    "speculative": "student, speculative",      # not in runs that are older than this column
}
PLOTS = {}      # the pictures are those of the first seed's run: a results file does not hold what they show


def table(results: dict) -> str:
    """Markdown: mean over seeds, and smallest to largest where there are several."""
    models = [model for model in MODELS if model in results["runs"][0]["summary"]]
    rows = []
    for metric, unit in ROWS.items():
        cells = []
        for model in models:
            values = of(results, model, metric)
            cells.append(mean_range(values) if values else "")
        if any(cells):
            rows.append([f"`{metric}`, {unit}", *cells])
    return markdown_table(["", *(MODELS[model] for model in models)], rows)


def closing_table(results: dict) -> str:
    """What the first seed's run printed, as a block of text."""
    return f"```\n{compare.table(results['runs'][0]['summary'])}\n```"


def of(results: dict, model: str, metric: str) -> list[float]:
    """By seed, a metric of a model; empty if it was not measured."""
    values = [run["summary"][model].get(metric) for run in results["runs"]]
    return [] if None in values else values


def updates(results: dict) -> tuple[int, int]:
    """Updates in all, and those of them on training stories."""
    config = results["runs"][0]["header"]["config"]
    return config["distill_steps"], config["warm_steps"]


def settings(results: dict) -> str:
    """What the runs had: updates, whose text they learned from, temperature and learning rate."""
    config = results["runs"][0]["header"]["config"]
    total, warm = updates(results)
    shares = f"the first {warm} on training text and {total - warm}" if warm else "all"
    way = "as an AR model" if config["source"] == "student-ar" else "by the reveal rule"
    return (f"{total} updates, {shares} on text that the student writes {way}; "
            f"temperature {config.get('temperature', 1.0)}, learning rate {config['lr']}.")


def duration(results: dict) -> str:
    seconds = [run["seconds"] for run in results["runs"]]
    if len(seconds) == 1:
        return f"{seconds[0]} seconds"
    return f"{min(seconds)} to {max(seconds)} seconds per seed"


def page(all_results: dict[str, dict]) -> str:
    story_world = all_results["story_world"]
    real_text = all_results["tinystories"]
    by_reveal_rule = all_results["tinystories_student"]
    return md.join(
        f"# {TITLE}",
        md.paragraph("""
            The default command of the project, `python train_tiny.py`, over several seeds. It pretrains an AR
            model, copies it under another attention mask (the student before), distils it first on training
            stories (`--warm_steps`), then on text that it generates itself, and compares the student after
            that with its teacher. Text is sampled with the default rule, leftmost:0.98; in the last column
            the student drafts a block and verifies it itself, as an AR model. All columns have the
            temperature at which the student's text was generated in training."""),
        md.paragraph("""
            `val_nats` is the NLL of held-out stories by the chain rule: the student reveals from left to
            right, one token at a time. `gen_nats` is the NLL of generated text under the teacher, `valid` the
            share of stories that break no law of the story world, `broken` the laws broken per story,
            `recovery` the rate of broken laws after the first one over the rate up to it, `agreement` the
            share of tokens that are the teacher's most likely one, `distinct2` the share of different token
            pairs, `entropy` that of single tokens. `tok_per_fwd` counts all forward passes, prefill included;
            `positions_per_tok` counts the positions that they process."""),
        "## The story world",
        md.measured(story_world, "story_world", duration(story_world), story_world["runs"][0]["header"]),
        md.paragraph(f"""
            Three seeds, 512 stories each; mean (smallest to largest). {settings(story_world)} Other work ran
            beside these runs, so their seconds are upper bounds."""),
        table(story_world),
        md.details("The closing table of seed 0, as the run prints it", closing_table(story_world)),
        md.picture("story_world", "Loss and KL against training tokens, seed 0"),
        md.picture("story_world_states", "A story of the converted model: one row per forward pass"),
        "### What was found",
        md.bullets(story_world_findings(story_world)),
        "## TinyStories",
        md.paragraph("""
            On real text the defaults are for the last column, in which the student verifies its own drafts.
            It learns from the text that it writes as an AR model at temperature 0 (`--source=student-ar`),
            with the teacher's most likely token as target (`--target=sampled`), and a second loss on
            training text keeps it a good AR model (`--clean_weight=2 --clean_text=data`)."""),
        md.measured(real_text, "tinystories", duration(real_text), real_text["runs"][0]["header"]),
        md.paragraph(f"""
            One seed, 128 stories. 15 MB of the training file, 0.8 MB of the validation file, a BPE of 2,048
            tokens, 2.2 million parameters. {settings(real_text)} Two threads."""),
        table(real_text),
        md.picture("tinystories", "Loss and KL against training tokens"),
        md.picture(
            "tinystories_states", "A TinyStories text of the converted model: one row per forward pass"
        ),
        "### What was found on TinyStories",
        md.bullets(real_text_findings(real_text)),
        "## TinyStories, text by the reveal rule",
        md.measured(
            by_reveal_rule,
            "tinystories_student",
            duration(by_reveal_rule),
            by_reveal_rule["runs"][0]["header"],
        ),
        md.paragraph(f"""
            The same AR model, converted as in the story world. {settings(by_reveal_rule)} Two threads; other
            work ran beside it for some minutes."""),
        table(by_reveal_rule),
        md.bullets(reveal_rule_findings(by_reveal_rule)),
    )


def story_world_findings(results: dict) -> list[str]:
    def cell(model: str, metric: str) -> str:
        return mean_range(of(results, model, metric))

    tokens = statistics.mean(of(results, "after", "train_tokens"))
    total, warm = updates(results)
    shares = results["runs"][0]["share"]
    return [
        "Changing the mask costs little when text is revealed from left to right: `val_nats` before any "
        f"training is {cell('before', 'val_nats')}, the teacher's {cell('ar', 'val_nats')}. With align=ar "
        "and context=causal the student still reads what the AR model reads.",
        f"It costs everything when several tokens are revealed together: `valid` before training is "
        f"{cell('before', 'valid')} at {cell('before', 'tok_per_fwd')} tokens per forward pass.",
        f"After {tokens / 1000:.0f}k response tokens `valid` is {cell('after', 'valid')} at "
        f"{cell('after', 'tok_per_fwd')} tokens per forward pass. The teacher's is {cell('ar', 'valid')}, at "
        "one.",
        f"Drafted and verified by the student itself, {cell('speculative', 'valid')} of the stories are "
        f"valid at {cell('speculative', 'tok_per_fwd')} tokens per forward pass: more tokens than by the "
        f"reveal rule, at {cell('speculative', 'positions_per_tok')} positions per token.",
        f"{total - warm} of {total} updates learn from the student's own text, and need only prompts. "
        "Training stories are unlimited here; where they are, they teach at least as well "
        "([methods](../methods/README.md)).",
        f"A forward pass of the student processes more: {cell('after', 'positions_per_tok')} positions per "
        f"token, where AR takes {cell('ar', 'positions_per_tok')}.",
        f"Useful arithmetic is {shares['stories']:.0%} of a matrix product's speed in updates on stories and "
        f"{shares['own_text']:.0%} in updates on own text (seed 0): short rollouts on a CPU are mostly "
        "overhead.",
    ]


def real_text_findings(results: dict) -> list[str]:
    """Of a student that has learned to verify itself."""
    def value(model: str, metric: str) -> float:
        return of(results, model, metric)[0]

    return [
        f"Drafted and verified by the student itself it is {value('speculative', 'tok_per_fwd'):.2f} tokens "
        f"per forward pass at temperature 0, {value('speculative', 'positions_per_tok'):.1f} positions per "
        f"token. On two CPU threads it makes {value('speculative', 'tok_s'):.0f} tokens per second and AR "
        f"{value('ar', 'tok_s'):.0f}, with 128 texts at once: a pass over many positions takes longer.",
        f"The AR model's NLL of its text is {value('speculative', 'gen_nats'):.2f} nats per token, and "
        f"{value('ar', 'gen_nats'):.2f} of the AR model's own. Greedy text of so small a model repeats "
        f"itself: `distinct2` is {value('speculative', 'distinct2'):.3f} and "
        f"{value('ar', 'distinct2'):.3f}.",
        f"As an AR model the student loses {value('speculative', 'val_nats') - value('ar', 'val_nats'):.2f} "
        "nats per token of held-out text.",
        f"The reveal rule leftmost:0.98 gains little: {value('after', 'tok_per_fwd'):.3f} tokens per forward "
        "pass. A second position rarely has a probability above 0.98.",
    ]


def reveal_rule_findings(results: dict) -> list[str]:
    def value(model: str, metric: str) -> float:
        return of(results, model, metric)[0]

    total, warm = updates(results)
    return [
        f"At the default rule the student makes {value('after', 'tok_per_fwd'):.3f} tokens per forward pass "
        f"and processes {value('after', 'positions_per_tok'):.1f} positions per token: **it costs more than "
        "AR**. On real text a second position hardly ever has a probability above 0.98.",
        f"Its text is {value('after', 'gen_nats') - value('ar', 'gen_nats'):.2f} nats per token above the "
        f"teacher's, and held-out text {value('after', 'val_nats') - value('ar', 'val_nats'):.3f}; before "
        f"training it was {value('before', 'gen_nats') - value('ar', 'gen_nats'):.2f} and "
        f"{value('before', 'val_nats') - value('ar', 'val_nats'):.3f}.",
        f"Drafted and verified by the student itself it is {value('speculative', 'tok_per_fwd'):.3f} tokens "
        f"per forward pass, {value('speculative', 'positions_per_tok'):.1f} positions per token. Its text "
        f"is {value('speculative', 'gen_nats') - value('ar', 'gen_nats'):.2f} nats above the teacher's.",
        f"{total} updates ({total - warm} of them on own text) are few for this text: the KL still "
        "falls, slowly, when the run ends.",
    ]
