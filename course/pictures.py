"""Draw the pictures of the lessons: course/NN_name/picture.png, made for slides.

    python course/pictures.py                      all lessons
    python course/pictures.py 3                    lesson 3

One function per lesson. What is drawn comes from the project's own functions.
"""
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))        # the project's root

from course.check import lessons
from training import cli

# The colours of all pictures. DARK and LIGHT also differ in print without colours.
DARK, MIDDLE, LIGHT, ORANGE = "#1f4e79", "#5b9bd5", "#deebf7", "#d9730d"

# Lesson 1: masks and the bound --------------------------------------------------------------------


# Lesson 2: parallel reveals -----------------------------------------------------------------------


# Lesson 3: from AR to block -----------------------------------------------------------------------


# Lesson 4: cache and reveal rules -----------------------------------------------------------------


# Lesson 5: likelihood -----------------------------------------------------------------------------


# Lesson 6: on-policy distillation -----------------------------------------------------------------


# Lesson 7: speculative decoding -------------------------------------------------------------------


# Lesson 8: schedules and policies -----------------------------------------------------------------


PICTURES = {     # each function returns a figure

}


def main(argv: list[str]) -> None:
    folders = lessons()
    chosen = argv or [str(number) for number in PICTURES]
    for word in chosen:
        if not word.isdigit() or int(word) not in PICTURES:
            raise ValueError(f"there is no picture {word!r}: give numbers from {min(PICTURES)} to "
                             f"{max(PICTURES)}")
        path = folders[int(word)] / "picture.png"
        plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
        figure = PICTURES[int(word)]()
        figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        print(f"{path} ({path.stat().st_size / 1000:.0f} KB)")


if __name__ == "__main__":
    sys.exit(cli.run(main))
