"""From a folder's format to what multiplies by its weights: the first way whose trial passes on the device."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import torch

from ..checkpoint.tensors import tensor_table
from ..errors import SettingError
from .adapted import AdaptedLinears
from .base import DenseLinears, Refused, Site, StoredLinears
from .dense.spec import DENSE_WAYS
from .registry import check_backend, format_spec
from .spec import Environment, Way


def stored_linears(site: Site) -> StoredLinears:
    """As `chosen_linears`, with the folder's adapters beside the weights that they cannot be merged into."""
    linears = chosen_linears(site)
    if not site.folder.beside:
        return linears
    assert site.dense is not None, "weights in floats have their adapters merged"
    return AdaptedLinears(linears, site.folder.beside, tensor_table(site.folder.config), site.dense)


def chosen_linears(site: Site) -> StoredLinears:
    """The way to run a folder's linears on a device; `site.reasons` gets why each preferred way was refused.

    Raises:
        CheckpointError: the folder's format is unknown, or it contradicts itself.
        SettingError: the backend cannot run this format, or not here.
        MissingExtraError: the backend's package is not installed.
    """
    spec = format_spec(site.folder.format)
    check_backend(spec, site.backend)
    layout = spec.layout(site.folder)
    here = environment(site.device, site.dtype, layout.missing)
    if spec.ways == DENSE_WAYS:
        return first_way(tuple(spec.ways_by(site.backend)), site, here, "dense")
    dense = first_way(DENSE_WAYS, site, here, "dense")
    assert isinstance(dense, DenseLinears)
    site.dense = dense
    return first_way(tuple(spec.ways_by(site.backend)), site, here, spec.name)


def first_way(ways: tuple[Way, ...], site: Site, here: Environment, what: str) -> StoredLinears:
    """The first of the ways that can be used; why each before it cannot is noted as "WHAT kernel NAME".

    Raises:
        SettingError: none can.
    """
    refused: list[str] = []
    for way in ways:
        why = way.requires.unmet(here)
        if why is None:
            try:
                linears = make(way, site)
                site.dequantizes = way.weights == "dequantized"
                return linears
            except Refused as reason:
                why = str(reason)
        refused.append(f"{way.name}: {why}")
        site.reasons[f"{what} kernel {way.name}"] = why
    raise SettingError(f"{what} cannot run here by backend {site.backend} ({'; '.join(refused)}); choose backend auto")


def make(way: Way, site: Site) -> StoredLinears:
    """What the way is, on this device.

    Raises:
        Refused: its trial failed.
    """
    module, _, name = way.make.partition(":")
    linears: StoredLinears = getattr(import_module(module), name)(site)
    return linears


def environment(device: torch.device, dtype: torch.dtype, missing: Mapping[str, str]) -> Environment:
    """What ways are chosen by, of the device itself."""
    from ..hardware.features import why_off
    from ..kernels import nvrtc, triton_language

    reasons = {"triton": why_off("triton") or triton_language.MISSING, "nvrtc": nvrtc.why_unavailable(device)}
    absent = {name: why for name, why in reasons.items() if why is not None}
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return Environment(device.type, str(dtype).removeprefix("torch."), capability, {**absent, **missing})
