"""How fine-tunes that answer in texts and pictures ask for a picture: one entry a family, as data.

Facts as their authors' code has them. What asks is either a special token in place of the one that ends a text, or a
mark somewhere in a text that has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .config import BagelConfig, ResizeRule

AUTO, BASE = "auto", "base"


@dataclass(frozen=True)
class AnswerStyle:
    """One family's.

    Attributes:
        marks: a text with one of them in it asks for a picture.
        ends: a text with one of them in it is the last. Without `marks`, any other asks for a picture.
        rounds: pictures of an answer at most, where nothing else is said.
        vit_resize: the family's rule for what the vision tower is shown, where it is not the published model's.
        checkpoints: parts of their names, in small letters.
    """

    marks: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    rounds: int = 3
    vit_resize: ResizeRule | None = None
    checkpoints: tuple[str, ...] = ()

    def asks(self, text: str, whole: bool) -> bool:
        """Whether a picture comes after a text that ended by itself, or, not `whole`, where its tokens had run out."""
        if any(end in text for end in self.ends):
            return False
        if self.marks:
            return any(mark in text for mark in self.marks)
        return whole and bool(self.ends)

    def shown_by(self, config: BagelConfig) -> BagelConfig:
        """The configuration with the family's rule, unless the folder has one of its own."""
        if self.vit_resize is None or config.vit_resize != BagelConfig.vit_resize:
            return config
        return replace(config, vit_resize=self.vit_resize)


STYLES: Mapping[str, AnswerStyle] = {
    BASE: AnswerStyle(),
    "thinkmorph": AnswerStyle(("<image_start>",), checkpoints=("thinkmorph",)),
    "unicot": AnswerStyle(("<image_start>",), checkpoints=("unicot", "uni-cot")),
    "zebra-cot": AnswerStyle(
        ends=("Final Answer:", "<answer>"), vit_resize=ResizeRule(980, 512, 14), checkpoints=("zebra-cot", "zebracot")
    ),
    "twiff": AnswerStyle(("<img>", "<image>"), ("<ans>", "</ans>"), rounds=8, checkpoints=("twiff",)),
}
"""vision_start in place of im_end asks for a picture in all of them, and is all that `base` has: so the demo checkpoint
is taught."""


def style_names() -> tuple[str, ...]:
    return (AUTO, *STYLES)


def style_name(wanted: str, names: Iterable[str]) -> str:
    """The style meant: by the names that a checkpoint has, where it is AUTO; BASE where none says anything."""
    if wanted != AUTO:
        return wanted
    said = [name.lower() for name in names]
    found = (key for key, style in STYLES.items() if any(part in name for part in style.checkpoints for name in said))
    return next(found, BASE)
