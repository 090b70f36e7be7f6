"""Answers in texts and pictures in the shape of chats: whole, and piece by piece as they come.

OpenAI's shape has texts alone. Pictures stand beside them as clients of other servers know them, as `images` of a
message or a delta, and `parts` has all in order, as the `content` of a next request takes it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response

from ..errors import SettingError
from ..settings import answer_options
from .events import DONE, event, event_stream
from .following import follow
from .intake import Intake, base64_of
from .openai_chat import Cut, Reply, settings_of, terms_of
from .openai_schemas import ChatAnswer, ChatFields, ChatUsage, Choice, DrawnAnswer, PicturePart, PictureUrl, TextPart
from .usage import tokens_of

if TYPE_CHECKING:
    from ..generation.conversing import Drawn, Piece


async def interleaved(intake: Intake, request: Request, body: ChatFields) -> Response | ChatAnswer:
    """Answer the last turn in texts and pictures.

    Raises:
        SettingError: stop sequences, which end a text and not what is asked for by it.
    """
    if body.stop:
        raise SettingError("stop is for answers in text alone; leave it out, or ask without image among the modalities")
    job = await intake.converse(request, terms_of(body.messages), settings_of(body, answer_options()))
    answering = Interleaved(intake, request, job)
    if body.stream:
        counted = body.stream_options is not None and body.stream_options.include_usage
        return event_stream(answering.events(bool(counted)))
    parts = [part async for part in answering.parts() if not isinstance(part, str)]
    return ChatAnswer(
        **answering.about,
        choices=[Choice(message=_message(parts), finish_reason=answering.reason)],
        usage=answering.usage(),
        settings=answering.settings,
    )


def _message(parts: Sequence[TextPart | PicturePart]) -> DrawnAnswer:
    text = "\n".join(part.text for part in parts if isinstance(part, TextPart) and part.text)
    return DrawnAnswer(content=text, images=[p for p in parts if isinstance(p, PicturePart)], parts=list(parts))


class Interleaved(Reply):
    """One in texts and pictures."""

    async def parts(self) -> AsyncGenerator[str | TextPart | PicturePart, None]:
        """Its texts as they grow (str), and each text and each picture when it is done.

        What was told stays true where memory runs out and the answer begins again: it comes to the same.
        """
        from ..generation.conversing import Said  # which needs torch: it is there when there are pieces

        done, cut = 0, Cut(())
        async with aclosing(follow(self.request, self.intake.service, self.job)) as following:
            async for self.last in following:
                if self.last.error is not None:
                    raise self.last.error
                for piece in self.last.pieces[done:]:
                    done += 1
                    if isinstance(piece, Said):
                        yield cut.feed(piece.text, True)
                        cut = Cut(())
                    yield await _part(piece)
                if len(self.last.pieces) == done and not self.last.over:
                    yield cut.feed(self.last.text, False)

    async def events(self, counted: bool) -> AsyncGenerator[bytes, None]:
        yield event(self.piece({"role": "assistant", "content": ""}) | {"settings": self.settings})
        told, apart = False, False
        async with aclosing(self.parts()) as parts:
            async for part in parts:
                if isinstance(part, str) and part:
                    yield event(self.piece({"content": f"\n{part}" if apart else part}))
                    told, apart = True, False
                elif isinstance(part, TextPart):
                    apart = told  # texts stand one under the other, as in `content`
                elif isinstance(part, PicturePart):
                    yield event(self.piece({"images": [part.model_dump()]}))
        yield event(self.piece({}, self.reason))
        if counted:
            yield event(self.piece() | {"usage": self.usage().model_dump()})
        yield DONE

    @property
    def settings(self) -> dict[str, Any]:
        return self.job.prepared.settings.to_json()

    @property
    def reason(self) -> Any:
        """Why it ended: "stop", or "length" where it would have gone on."""
        answer = self.last.answer
        assert answer is not None
        return "stop" if answer.ended == "text" else "length"

    def usage(self) -> ChatUsage:
        """Tokens of texts and pictures that were given, and of the texts that were written."""
        from ..generation.chat import PreparedTurn
        from ..generation.conversing import Said

        turn, answer, loaded = self.job.prepared, self.last.answer, self.intake.service.loaded
        assert isinstance(turn, PreparedTurn) and answer is not None
        assert loaded is not None
        asked = tokens_of(loaded, turn).total
        answered = sum(len(piece.decoded.ids) - 1 for piece in answer.pieces if isinstance(piece, Said))
        return ChatUsage(prompt_tokens=asked, completion_tokens=answered, total_tokens=asked + answered)


async def _part(piece: Piece) -> TextPart | PicturePart:
    from ..generation.conversing import Said

    if isinstance(piece, Said):
        return TextPart(type="text", text=piece.text)
    return PicturePart(type="image_url", image_url=PictureUrl(url=f"data:image/png;base64,{await _png(piece)}"))


async def _png(piece: Drawn) -> str:
    """It carries its settings."""
    return await base64_of(piece.image, "png", piece.settings)
