"""`megalodon.loss_chunk_tokens`: the loss part by part trains as the loss of all logits at once."""

from pathlib import Path

import pytest

from megalodon_plugin.titan.model_args import Flavors

from support.tiny_job import losses_and_norms, read_job, read_records, train_well, write_job


@pytest.mark.parametrize("processes", [1, 2])
def test_parts_train_as_the_whole_does(processes: int, tmp_path: Path) -> None:
    found = []
    for tokens in (0, 20):  # parts of 20 do not divide the 4 x 48 (2 x 48) tokens of a rank
        config = write_job(
            tmp_path / str(tokens),
            megalodon={"loss_chunk_tokens": tokens},
            training={"steps": 3, "local_batch_size": 4 // processes, "global_batch_size": 4},
            checkpoint={"enable": False},
        )
        train_well(config, processes=processes)
        found.append(losses_and_norms(read_records(tmp_path / str(tokens) / "run")))
    whole, parts = found
    assert whole.keys() == parts.keys() == {1, 2, 3}
    for step, numbers in whole.items():
        assert parts[step] == pytest.approx(numbers, rel=2e-5)


def test_a_negative_number_is_refused(tmp_path: Path) -> None:
    job = read_job(write_job(tmp_path), "--megalodon.loss_chunk_tokens", "-1")
    with pytest.raises(ValueError, match=r"`megalodon.loss_chunk_tokens` must be at least 0, but is -1"):
        Flavors()["debug"].update_from_config(job)
