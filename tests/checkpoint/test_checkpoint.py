"""Checkpoints in every format: round trips are bit-exact, and what is broken or foreign is refused."""

import dataclasses
import json
import os
import pickle
import re
import shutil

import pytest
import torch

from megalodon_plugin.checkpoint.checkpoint import Checkpoint, lowered, read_checkpoint, write_checkpoint
from megalodon_plugin.checkpoint.expected import expected_tensors
from megalodon_plugin.checkpoint.formats.authors import consolidate, split
from megalodon_plugin.cli.main import main
from megalodon_plugin.model import Megalodon, MegalodonConfig
from megalodon_plugin.model.precision import float32_parameters, lower_matrices

from support.small_model import SIZES

SIZES_OF_SHARDS = SIZES | {"vocab_size": 258, "dim": 24, "norm_groups": 6}
MODELS = {
    "plain": {},
    "tied": {"tie_embedding": True, "scale_embedding": True},
    "swiglu": {"swiglu": True, "rope_theta": 1e5, "dropout": 0.1, "hidden_dropout": 0.2, "attention_dropout": 0.3},
    "rescaled": {"rescale_ffn": True, "output_size": 260, "init_mode": "xavier"},
    "without affine norms": {"norm_affine": False, "norm_eps": 1e-6},
}


def checkpoint_of(tokenizer="byte", dtype=torch.float32, **options):
    model = Megalodon(MegalodonConfig(**SIZES_OF_SHARDS | options))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    lower_matrices(model, dtype)
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    return Checkpoint(model.cfg, tokenizer, tensors, "dcp")


def assert_same(a, b):
    assert a.config == b.config
    assert a.tensors.keys() == b.tensors.keys()
    for name, value in a.tensors.items():
        assert value.dtype == b.tensors[name].dtype, name
        assert torch.equal(value, b.tensors[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_a_way_through_all_formats_and_back_changes_no_bit(tmp_path, options, dtype):
    first = checkpoint_of(dtype=dtype, **options)
    steps = [("dcp", 1), ("safetensors", 1), ("authors", 1), ("safetensors", 1), ("dcp", 1)]
    if not options.get("rescale_ffn"):
        steps.insert(3, ("authors", 2))
    checkpoint = first
    for i, (kind, shards) in enumerate(steps):
        write_checkpoint(tmp_path / f"{i}", checkpoint, kind, shards, max_shard_bytes=5000)
        checkpoint = read_checkpoint(tmp_path / f"{i}")
        assert checkpoint.format == kind
        assert checkpoint.tokenizer == "byte"
        assert_same(first, checkpoint)
    assert not list(tmp_path.glob("*.unfinished"))
    assert len(list((tmp_path / "1").glob("*.safetensors"))) > 1


def test_shards_are_those_of_model_parallel_ranks():
    """Sizes along the cut axis halve; what every rank holds whole is the same in both."""
    shapes = {
        "embed.weight": (258, 24),
        "layers.0.mega.wv.weight": (20, 24),
        "layers.0.mega.wv.bias": (20,),
        "layers.0.mega.wh2.weight": (24, 20),
        "layers.0.mega.gamma": (2, 8),
        "layers.0.mega.cema.theta": (24, 1, 1),
        "layers.0.mega.timenorm.prior_mean": (6,),
        "layers.0.mega.timenorm.prior_count": (),
        "layers.0.mega.rmsnorm.weight": (24,),
        "layers.0.nffn.fc2.weight": (24, 14),
        "output.final_norm.weight": (24,),
        "rope.freqs": (8, 4),
    }
    whole = {name: torch.randn(shape) for name, shape in shapes.items()}
    halves = split(whole, 2)
    assert [tuple(value.shape) for value in halves[1].values()] == [
        (258, 12),
        (10, 24),
        (10,),
        (24, 10),
        (2, 4),
        (12, 1, 1),
        (3,),
        (),
        (24,),
        (24, 7),
        (12,),
        (8, 4),
    ]
    assert torch.equal(halves[0]["layers.0.mega.gamma"], whole["layers.0.mega.gamma"][:, :4])
    assert all(torch.equal(value, whole[name]) for name, value in consolidate(halves).items())
    halves[1]["rope.freqs"] = torch.zeros(8, 4)
    with pytest.raises(ValueError, match=re.escape("`rope.freqs` must be the same in every shard, but is not")):
        consolidate(halves)
    del halves[1]["embed.weight"]
    with pytest.raises(ValueError, match=re.escape("`embed.weight` is not in both shard 0 and 1")):
        consolidate(halves)


def test_the_released_config_is_read_with_its_defaults(tmp_path):
    write_checkpoint(tmp_path / "a", checkpoint_of(), "authors")
    content = json.loads((tmp_path / "a/config.json").read_text())
    assert content["model"]["output_size"] == -1
    assert content["model"]["norm_num_groups"] == 6
    content["model"] |= {"rope_base": None, "efficient_attn": "fused", "layerwise_ckpt": True}
    (tmp_path / "a/config.json").write_text(json.dumps(content))
    assert read_checkpoint(tmp_path / "a").config == checkpoint_of().config


def test_the_tokenizer_file_goes_with_the_model(tmp_path):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text("{}")
    write_checkpoint(tmp_path / "a", checkpoint_of(tokenizer=str(tmp_path / "tok")), "safetensors")
    shutil.rmtree(tmp_path / "tok")
    assert read_checkpoint(tmp_path / "a").tokenizer == str(tmp_path / "a")
    assert (tmp_path / "a/tokenizer.json").is_file()
    (tmp_path / "x.model").write_text("ranks")
    write_checkpoint(tmp_path / "b", checkpoint_of(tokenizer=str(tmp_path / "x.model")), "authors")
    assert read_checkpoint(tmp_path / "b").tokenizer == str(tmp_path / "b/x.model")


def test_a_write_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr("megalodon_plugin.checkpoint.formats.safetensors.write_tensors", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_checkpoint(tmp_path / "a", checkpoint_of(), "safetensors")
    assert not list(tmp_path.iterdir())


def test_a_tied_output_weight_may_be_missing_in_the_authors_format(tmp_path):
    first = checkpoint_of(tie_embedding=True)
    write_checkpoint(tmp_path / "a", first, "authors")
    released = torch.load(tmp_path / "a/consolidated.pth")
    del released["output.output.weight"]
    torch.save(released, tmp_path / "a/consolidated.pth")
    assert_same(read_checkpoint(tmp_path / "a"), first)


class TestLowered:
    def test_a_tied_output_weight_is_still_the_embedding(self):
        found = lowered(checkpoint_of(tie_embedding=True), torch.bfloat16)
        assert found.tensors["output.weight"] is found.tensors["tok_embeddings.weight"]
        assert found.tensors["output.weight"].dtype == torch.bfloat16

    def test_it_is_what_lowering_the_model_gives(self):
        assert_same(lowered(checkpoint_of(), torch.bfloat16), checkpoint_of(dtype=torch.bfloat16))

    def test_other_dtypes_are_refused(self):
        with pytest.raises(ValueError, match=re.escape("`dtype` must be float32 or bfloat16, but is torch.float16")):
            lowered(checkpoint_of(), torch.float16)

    def test_names_and_shapes_of_one_configuration_are_found_once(self):
        config = checkpoint_of().config
        assert expected_tensors(config) is expected_tensors(dataclasses.replace(config))
        assert expected_tensors(config) != expected_tensors(dataclasses.replace(config, n_layers=1))


class TestCode:
    """A pickle may call any function while it is loaded."""

    class Mark:
        def __init__(self, path):
            self.path = path

        def __reduce__(self):
            return os.mkdir, (str(self.path),)

    def test_in_a_released_file(self, tmp_path):
        write_checkpoint(tmp_path / "a", checkpoint_of(), "authors")
        torch.save({"embed.weight": self.Mark(tmp_path / "ran")}, tmp_path / "a/consolidated.pth")
        with pytest.raises(ValueError, match=r"consolidated\.pth must be a whole file of tensors and nothing else"):
            read_checkpoint(tmp_path / "a")
        assert not (tmp_path / "ran").exists()

    def test_in_the_index_of_a_host_checkpoint(self, tmp_path):
        write_checkpoint(tmp_path / "a", checkpoint_of(), "dcp")
        (tmp_path / "a/.metadata").write_bytes(pickle.dumps(self.Mark(tmp_path / "ran")))
        with pytest.raises(ValueError, match=r"names posix\.mkdir, .*: it may contain code"):
            read_checkpoint(tmp_path / "a")
        assert not (tmp_path / "ran").exists()


class TestErrors:
    @pytest.mark.parametrize("kind", ["dcp", "safetensors", "authors"])
    def test_a_cut_file(self, tmp_path, kind):
        write_checkpoint(tmp_path / "a", checkpoint_of(), kind)
        file = max((tmp_path / "a").iterdir(), key=lambda path: path.stat().st_size)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"must be (a whole|complete and readable)"):
            read_checkpoint(tmp_path / "a")

    @pytest.mark.parametrize("kind", ["dcp", "safetensors", "authors"])
    def test_nan_in_the_weights(self, tmp_path, kind):
        checkpoint = checkpoint_of()
        checkpoint.tensors["layers.1.attention.wz.bias"][0] = float("nan")
        write_checkpoint(tmp_path / "a", checkpoint, kind)
        with pytest.raises(ValueError, match=r"`layers\.1\.attention\.wz\.bias` in .* holds NaN or infinity"):
            read_checkpoint(tmp_path / "a")

    def test_a_missing_shard(self, tmp_path):
        write_checkpoint(tmp_path / "a", checkpoint_of(), "safetensors", max_shard_bytes=5000)
        file = sorted((tmp_path / "a").glob("*.safetensors"))[-1]
        file.unlink()
        with pytest.raises(ValueError, match=r"must hold every file that .* names, but lacks"):
            read_checkpoint(tmp_path / "a")
        write_checkpoint(tmp_path / "b", checkpoint_of(), "authors", shards=2)
        (tmp_path / "b/consolidated.01.pth").unlink()
        with pytest.raises(ValueError, match=r"`model_parallel_size` = 2, but holds consolidated\.00\.pth"):
            read_checkpoint(tmp_path / "b")

    def test_an_index_that_names_what_is_not_there(self, tmp_path):
        write_checkpoint(tmp_path / "a", checkpoint_of(), "safetensors")
        path = tmp_path / "a/model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.more"] = next(iter(index["weight_map"].values()))
        path.write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"names, but lacks model\.more"):
            read_checkpoint(tmp_path / "a")

    def test_another_kind_of_model(self, tmp_path):
        write_checkpoint(tmp_path / "a", checkpoint_of(), "safetensors")
        path = tmp_path / "a/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
        with pytest.raises(ValueError, match=r"`model_type` in .* must be \"megalodon\", but is 'llama'"):
            read_checkpoint(tmp_path / "a")

    def test_another_configuration(self, tmp_path):
        write_checkpoint(tmp_path / "a", checkpoint_of(), "safetensors")
        path = tmp_path / "a/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"n_layers": 3}))
        with pytest.raises(ValueError, match=r"does not fit its own configuration: .* missing layers\.2\."):
            read_checkpoint(tmp_path / "a")

    def test_what_the_authors_format_cannot_hold(self, tmp_path):
        for options, shards, message in [
            ({"cema_input": "paper"}, 1, '`cema_input` must be "released" in the authors\' format'),
            ({}, 4, "`n_heads` must be divisible by `--shards` = 4, but is 2"),
            ({"rescale_ffn": True}, 2, "`--shards` must be 1 with `rescale_ffn`"),
        ]:
            with pytest.raises(ValueError, match=re.escape(message)):
                write_checkpoint(tmp_path / "a", checkpoint_of(**options), "authors", shards)
        assert not list(tmp_path.iterdir())

    def test_a_target_that_exists(self, tmp_path):
        with pytest.raises(ValueError, match="`target` must not exist yet, but"):
            write_checkpoint(tmp_path, checkpoint_of(), "dcp")

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"must be complete and in .* but has no \.metadata"):
            read_checkpoint(tmp_path)


class TestCommand:
    def test_it_converts_and_says_so(self, tmp_path, capsys):
        write_checkpoint(tmp_path / "a", checkpoint_of(), "dcp")
        main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "authors", "--shards", "2"])
        out = capsys.readouterr().out
        assert "(dcp) ->" in out
        assert "parameters" in out
        assert_same(read_checkpoint(tmp_path / "b"), checkpoint_of())

    def test_dtype_changes_the_matrices_alone(self, tmp_path):
        write_checkpoint(tmp_path / "a", checkpoint_of(tie_embedding=True), "dcp")
        main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "safetensors", "--dtype", "bfloat16"])
        found = read_checkpoint(tmp_path / "b")
        with torch.device("meta"):
            model = Megalodon(found.config)
        kept = float32_parameters(model)
        for name, parameter in model.named_parameters():
            assert found.tensors[name].dtype == (torch.float32 if parameter in kept else torch.bfloat16), name

    def test_errors_come_before_anything_is_written(self, tmp_path):
        write_checkpoint(tmp_path / "a", checkpoint_of(), "dcp")
        with pytest.raises(SystemExit, match="megalodon convert: `--shards` must be 1 except in the authors' format"):
            main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "safetensors", "--shards", "2"])
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
