"""Where a conversion works and how its result appears: the states of OUT and OUT.partial.

    OUT.partial/journal.jsonl   what is done
    OUT.partial/variant/        the folder that will become OUT
    OUT.partial/replaced/       the old OUT, from the moment it is moved away until the new one stands

Publishing is: journal says "complete"; the old OUT, if any, moves to `replaced`; `variant` is renamed to OUT;
OUT.partial is removed. Whatever step a kill falls on, opening the workspace again goes on from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowmem_bagel.errors import ConversionError

from .fsio import fsync_folder, remove_tree, rename
from .journal import JOURNAL_NAME, Journal
from .places import check_out, partial_of


class Workspace:
    """OUT.partial, opened for one identity (source, format and settings). Close it, whatever happens.

    Attributes:
        variant: the folder to fill.
        journal: its lines after the first, which holds the identity.
        published: the same command had finished before and only its cleaning up was missing.
    """

    def __init__(self, out: Path, identity: dict[str, Any], *, overwrite: bool, restart: bool) -> None:
        """Open, resume or begin.

        Raises:
            ConversionError: OUT is in the way, or OUT.partial holds the work of another conversion.
        """
        self.out = out
        self.partial = partial_of(out)
        self.variant = self.partial / "variant"
        self._replaced = self.partial / "replaced"
        self._overwrite = overwrite
        self.published = False
        _check_partial(self.partial)
        if not self.partial.exists():
            check_out(out, overwrite=overwrite)
            self.partial.mkdir()
            fsync_folder(self.partial.parent)
        self.journal = Journal(self.partial, fresh=restart)
        try:
            self._resume(identity)
        except BaseException:
            self.journal.close()
            raise

    def publish(self) -> None:
        """Make the finished folder appear as OUT."""
        if not self._complete():
            self.journal.append({"complete": True})
        if self.out.exists():
            rename(self.out, self._replaced)
            fsync_folder(self.partial)
        rename(self.variant, self.out)
        fsync_folder(self.out.parent)
        self._clean()

    def close_after(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Close it at the end of a `with` block. What failed before a single shard was done leaves nothing behind."""
        if error is not None and not self._worth_keeping():
            remove_tree(self.variant)
            self.journal.close()
            remove_tree(self.partial)
        self.journal.close()

    def _worth_keeping(self) -> bool:
        """Whether there is a shard that need not be made again, or an old folder that was moved here."""
        return self._replaced.exists() or any("shard" in line or "complete" in line for line in self.journal.lines)

    def _resume(self, identity: dict[str, Any]) -> None:
        lines = self.journal.lines
        if lines and lines[0] != {"identity": identity} and not self._worth_keeping():
            self.journal.forget()
        if lines and lines[0] != {"identity": identity}:
            raise ConversionError(
                f"{self.partial}: holds unfinished work of another conversion or of a source that changed since "
                f"({_difference(lines[0].get('identity'), identity)}); "
                "repeat that command, or discard the work with --restart"
            )
        if self._complete() and not self.variant.exists() and self.out.exists():
            self._clean()
            self.published = True
            return
        if not self._complete() and self._replaced.exists():  # discarded between the two renames of `publish`
            rename(self._replaced, self.out)
        check_out(self.out, overwrite=self._overwrite)
        if not lines:
            remove_tree(self.variant)
            self.journal.append({"identity": identity})
        self.variant.mkdir(exist_ok=True)
        fsync_folder(self.partial)

    def _complete(self) -> bool:
        return {"complete": True} in self.journal.lines

    def _clean(self) -> None:
        """Remove OUT.partial, the journal last: as long as it exists, it explains the rest."""
        remove_tree(self._replaced)
        self.journal.close()
        remove_tree(self.partial)
        fsync_folder(self.out.parent)


def _check_partial(partial: Path) -> None:
    """An empty one is what a kill in the last step of cleaning up leaves."""
    known = {JOURNAL_NAME, "variant", "replaced"}
    if partial.is_dir() and not any(partial.iterdir()):
        partial.rmdir()
    if partial.exists() and not (partial.is_dir() and {p.name for p in partial.iterdir()} <= known):
        raise ConversionError(f"{partial}: was not made by a conversion; move it away")


def _difference(old: object, new: dict[str, Any]) -> str:
    if not isinstance(old, dict):
        return "journal unreadable"
    return "different " + ", ".join(sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)))
