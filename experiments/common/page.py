"""Parts of a results page, in Markdown."""
import textwrap

WIDTH = 115


def paragraph(text: str, indent: str = "") -> str:
    """The text in lines of at most WIDTH characters."""
    words = " ".join(text.split())
    return textwrap.fill(
        words, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def bullets(items: list[str]) -> str:
    return "\n".join(paragraph("- " + item, indent="  ") for item in items)


def warning(items: list[str]) -> str:
    """A quoted list with a bold heading, above tables that must not be read alone."""
    lines = ["**Read this before the tables.**", ""]
    lines += bullets(items).splitlines()
    return "\n".join(f"> {line}".rstrip() for line in lines)


def details(summary: str, text: str) -> str:
    """A part that a reader unfolds."""
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def picture(file: str, alt: str) -> str:
    return f"![{alt}](results/{file}.png)"


def measured(results: dict, variant: str, duration: str, machine: dict | None = None) -> str:
    """The command, how long it takes, the commit and the machine, and where all numbers are."""
    facts = machine or results
    threads = facts["threads"]
    return "\n".join(
        [
            "```bash",
            results["command"],
            "```",
            "",
            paragraph(
                f"Takes {duration}. These results: commit {facts['commit']}, torch {facts['torch']}, Python "
                f"{facts['python']}, {facts['device']}, {threads} thread{'s' if threads > 1 else ''} per "
                f"process. All numbers: [results/{variant}.json](results/{variant}.json)."
            ),
        ]
    )


def join(*parts: str) -> str:
    """A page: its parts with an empty line between them."""
    return "\n\n".join(part for part in parts if part) + "\n"
