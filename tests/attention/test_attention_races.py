"""No two threads of the attention kernel race, as far as Pallas's interpreter sees.

Without an append: that one writes a slot while the tile around it is copied, on purpose, and puts
the new token into the copy itself.
"""

import pytest
from attention_reference import cache_and_query, definition, relative_error
from hopper import on_hopper
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from jaxquant.attention import decode_attention, mosaic_gpu


@pytest.mark.parametrize(
    ("B", "H", "G", "lengths"),
    [(2, 2, 4, [71, 400]), (1, 1, 12, [333])],  # a thread block for a head, or a cluster
)
def test_attending(monkeypatch, B, H, G, lengths):
    q, k, v, lengths = cache_and_query(B, H, G, 400, 128, "bfloat16", lengths=lengths)
    with on_hopper(monkeypatch, mosaic_gpu, detect_races=True):
        y = decode_attention(q, k, v, 1, lengths, implementation="mosaic_gpu")
        found = gpu_callbacks.get_races().races_found
    assert relative_error(y, definition(q, k, v, 1, lengths)) < 3e-3
    assert not found
