"""DFloat11 weights, decoded at every use or while loading: see `spec`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...errors import SettingError
from ...hardware.features import why_off
from ..base import Refused, Site, StoredLinears
from . import kernels
from .linear import CompressedGroups, DecodedAtLoad, Decoder, DFloat11Linears, Scratch

if TYPE_CHECKING:
    from .kernels import Group


def at_use(site: Site) -> StoredLinears:
    why = kernels.why_unavailable(site.device)
    if why is not None:
        raise Refused(why)
    assert site.dense is not None
    scratch = Scratch(site.device, site.dtype)
    return DFloat11Linears(CompressedGroups(site.folder), site.dense, scratch, kernels.Decoder)


def at_load(site: Site) -> StoredLinears:
    assert site.dense is not None
    return DecodedAtLoad(CompressedGroups(site.folder), site.dense)


def package(site: Site) -> StoredLinears:
    """By the dfloat11 package's kernel.

    Raises:
        MissingExtraError: the package is not installed.
        SettingError: it is switched off, or cannot write what is asked for.
    """
    from . import package_kernel

    off = why_off("dfloat11")
    if off is not None:
        raise SettingError(f"the dfloat11 package is {off}; unset it, or choose another backend")
    if site.dtype != torch.bfloat16:
        raise SettingError("the dfloat11 package's kernel writes bfloat16 alone; choose backend auto")
    launch, by = package_kernel.load(site.device)

    def make(groups: Sequence[Group], device: torch.device, dtype: torch.dtype) -> Decoder:
        return package_kernel.PackageDecoder(groups, device, dtype, launch)

    assert site.dense is not None
    scratch = Scratch(site.device, site.dtype)
    by = f" by the dfloat11 package's kernel through {by}"
    return DFloat11Linears(CompressedGroups(site.folder), site.dense, scratch, make, by)
