"""In which order the tiles of a matmul are walked."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

from .triton_language import jit, tl


@jit
def tile_origin(index, m, n, TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP: tl.constexpr):
    """Tiles are walked in bands of GROUP tile rows, so that neighbours in time share operands in the cache."""
    tiles_m = tl.cdiv(m, TILE_M)
    tiles_n = tl.cdiv(n, TILE_N)
    band = index // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP, GROUP)
    inside = index % (GROUP * tiles_n)
    return (band * GROUP + inside % height) * TILE_M, (inside // height) * TILE_N
