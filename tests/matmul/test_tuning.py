"""The tables of tuned configs, and what is said of bad ones."""

import dataclasses
import json
import re

import jax
import pytest

from jaxquant.errors import JaxquantError
from jaxquant.matmul import decode_sm90, gemm_sm90, tuning, w8a16_sm90

TILE = {"tile_m": 128, "cluster": False, "tile_n": 128}


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Writes the user's table for a device, as what this process runs on."""
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("JAXQUANT_TUNED", str(path))
    monkeypatch.setattr(tuning, "_device_kind", lambda: "NVIDIA H200")
    tuning._configs.cache_clear()

    def write(content):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        tuning._configs.cache_clear()
        return path

    yield write
    tuning._configs.cache_clear()


@pytest.mark.parametrize(
    ("M", "rounded"), [(1, 8), (8, 8), (100, 112), (512, 512), (513, 640), (8191, 8192)]
)
def test_a_bucket_is_less_than_a_quarter_wide(M, rounded):
    assert tuning.bucket(M) == rounded
    assert tuning.bucket(rounded) == rounded


def test_the_shipped_table_is_valid_and_for_the_shapes_of_the_benchmark():
    table = tuning._load(tuning._SHIPPED)
    shapes = [tuple(map(int, key.split("x"))) for key in table["NVIDIA H200"]["gemm"]]
    assert (512, 4096, 14336) in shapes
    assert all(tuning.bucket(M) == M for M, _, _ in shapes)


def test_an_unknown_device_or_shape_has_no_tuned_config(table, monkeypatch):
    assert tuning.lookup("gemm", 512, 4096, 14336) is not None
    assert tuning.lookup("gemm", 512, 4096, 14337) is None
    monkeypatch.setattr(tuning, "_device_kind", lambda: "cpu")
    tuning._configs.cache_clear()
    assert tuning.lookup("gemm", 512, 4096, 14336) is None


def test_the_users_table_comes_first(table):
    mine = {"tile_m": 192, "cluster": True, "tile_n": 128}
    table({"NVIDIA H200": {"gemm": {"512x4096x14336": mine}}})
    assert tuning.lookup("gemm", 500, 4096, 14336) == mine
    assert tuning.lookup("gemm", 512, 4096, 4096) is not None  # the shipped one's
    assert gemm_sm90.default_config(512, 4096, 14336, 132) == gemm_sm90.Config(192, True, 128)


@pytest.mark.parametrize(("kernel", "module"), [("decode", decode_sm90), ("w8a16", w8a16_sm90)])
def test_kernels_of_few_tokens_take_what_was_tuned(table, kernel, module):
    default = module.default_config(16, 4096, 4096, 132)
    other = next(cut for cut in module.cuts(16, 4096, 4096) if cut != default)
    table({"NVIDIA H200": {kernel: {"16x4096x4096": dataclasses.asdict(other)}}})
    assert module.default_config(16, 4096, 4096, 132) == other
    assert module.default_config(17, 4096, 4096, 132) != other


@pytest.mark.parametrize("module", [decode_sm90, w8a16_sm90])
@pytest.mark.parametrize(("M", "N", "K"), [(5, 4096, 14336), (64, 28672, 4096), (100, 2112, 7168)])
def test_the_default_is_one_of_the_cuts(module, M, N, K):
    assert module.default_config(M, N, K, 132) in module.cuts(M, N, K)


@pytest.mark.parametrize(
    ("M", "weight_only", "kernel"),
    [(1, False, None), (16, False, "decode"), (512, False, "gemm"), (1, True, "w8a16")],
)
def test_the_kernel_that_is_tuned_is_the_one_that_runs(M, weight_only, kernel):
    assert tuning._kernel(M, 4096, 4096, 132, weight_only) == kernel


def test_the_users_table_is_in_the_cache_unless_named(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXQUANT_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.user_table() == tmp_path / "jaxquant" / "tuned.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON (Expecting property name enclosed in double quotes"),
        ("[]", "[]; allowed: an object keyed by device kind"),
        ({"H200": 3}, "H200: 3; allowed: an object keyed by kernel"),
        ({"H200": {"gem": {}}}, "H200/gem: 'gem'; allowed: gemm, decode, w8a16"),
        ({"H200": {"gemm": {"512": TILE}}}, "H200/gemm/512: '512'; allowed: MxNxK"),
        (
            {"H200": {"gemm": {"8x8x32": {"tile_m": 64}}}},
            "H200/gemm/8x8x32: {'tile_m': 64}; allowed: an object of tile_m, cluster, tile_n",
        ),
        (
            {"H200": {"gemm": {"8x8x32": TILE | {"cluster": 1}}}},
            "H200/gemm/8x8x32/cluster: 1; allowed: bools",
        ),
        (
            {"H200": {"gemm": {"8x8x32": TILE | {"tile_n": 200}}}},
            "H200/gemm/8x8x32: tile 128x200; allowed: 64x128, ",
        ),
        (
            {"H200": {"decode": {"8x8x640": dataclasses.asdict(decode_sm90.Config(64, splits=2))}}},
            "H200/decode/8x8x640: {'tile_n': 64, 'turns': 1, 'splits': 2, 'blocks': 1}; allowed: "
            '{"tile_n": 64, "turns": 1, "splits": 1, "blocks": 1}, '
            '{"tile_n": 128, "turns": 1, "splits": 1, "blocks": 1}',
        ),
    ],
)
def test_a_bad_table_is_one_error_that_names_file_and_field(table, content, message):
    path = table(content)
    with pytest.raises(JaxquantError, match=re.escape(f"{path}: {message}")):
        tuning.lookup("gemm", 512, 4096, 14336)


def test_tuning_needs_a_hopper_gpu():
    with pytest.raises(JaxquantError, match="tune: the device is cpu; allowed: Hopper GPUs"):
        tuning.tune([(512, 4096, 4096)])


def test_tuning_adds_to_the_users_table(table, monkeypatch):
    class H200:
        platform, device_kind, compute_capability, core_count = "gpu", "NVIDIA H200", "9.0", 132

    fast, slow = gemm_sm90.Config(256, True), gemm_sm90.Config(128, False)
    monkeypatch.setattr(jax, "devices", lambda: [H200])
    monkeypatch.setattr(tuning, "_measure", lambda *_: {fast: 1.0, slow: 2.0})
    path = table({"NVIDIA H200": {"gemm": {"8x8x32": TILE}}})
    shapes = [(1, 64, 1024), (1000, 64, 96)]  # the first has one config
    assert tuning.tune(shapes) == {(1000, 64, 96): {fast: 1.0, slow: 2.0}}
    assert tuning.lookup("gemm", 1024, 64, 96) == {"tile_m": 256, "cluster": True, "tile_n": 128}
    assert json.loads(path.read_text())["NVIDIA H200"]["gemm"]["8x8x32"] == TILE
    assert [p.name for p in path.parent.iterdir()] == ["tuned.json"]


def test_a_table_that_cannot_be_written_says_where(table, monkeypatch, tmp_path):
    path = tmp_path / "file" / "tuned.json"
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxquantError, match=re.escape(f"{path}: ")):
        tuning._write(path, {})
