"""The nodes: plain classes with what ComfyUI's V3 API asks a node for; `extension` makes ComfyUI's of them."""

from .answering import Ask, InterleaveAnswer
from .conversing import Converse
from .drawing import Edit, Frames, Interleave, TextToImage
from .latents import DecodeLatent
from .loading import Convert, Load
from .settings import DrawingSettings, EditingSettings

NODES: tuple[type, ...] = (
    Load,
    TextToImage,
    Edit,
    Ask,
    Frames,
    Interleave,
    InterleaveAnswer,
    Converse,
    DrawingSettings,
    EditingSettings,
    DecodeLatent,
    Convert,
)
