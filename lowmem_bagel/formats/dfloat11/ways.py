"""DFloat11 weights, decoded at every use or while loading: see `spec`."""

from __future__ import annotations

from ..base import Refused, Site, StoredLinears
from . import kernels
from .linear import CompressedGroups, DecodedAtLoad, DFloat11Linears, Scratch


def at_use(site: Site) -> StoredLinears:
    why = kernels.why_unavailable(site.device)
    if why is not None:
        raise Refused(why)
    assert site.dense is not None
    scratch = Scratch(site.device, site.dtype)
    return DFloat11Linears(CompressedGroups(site.folder), site.dense, scratch, kernels.CudaDecoder)


def at_load(site: Site) -> StoredLinears:
    assert site.dense is not None
    return DecodedAtLoad(CompressedGroups(site.folder), site.dense)
