"""What a stage's data goes through before the first step."""

import json

import pytest

from mllm_jax import preflight, stage_data
from mllm_jax.config import Config, ConfigError, DataConfig, StageConfig
from mllm_jax.data.records import DataError, Records


def stage_of(tmp_path, bad: int, count: int, **options) -> tuple[StageConfig, Records]:
  turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
  samples = [{"id": i, "conversations": turns if i >= bad else turns[:1]} for i in range(count)]
  (tmp_path / "train.json").write_text(json.dumps(samples))
  data = DataConfig(path=str(tmp_path / "train.json"), **options)
  return StageConfig(data=data, parameters=((".*", 1.0),), batch_size=4), Records.load(data.path, "")


def test_bad_samples_are_listed_and_stop_the_run(tmp_path):
  with pytest.raises(DataError) as error:
    stage_data.check_records(*stage_of(tmp_path, 12, 100))
  lines = str(error.value).splitlines()
  assert lines[0] == "12 of 100 samples cannot be used:" and lines[-1] == "  and 2 more" and len(lines) == 12
  assert "train.json, sample 0 ('0'): has no answer" in lines[1]


@pytest.mark.parametrize("policy,done", [("skip", "are skipped"), ("replace", "are replaced by others")])
def test_a_policy_lets_a_share_of_them_pass(tmp_path, capsys, policy, done):
  stage_data.check_records(*stage_of(tmp_path, 1, 100, on_bad_sample=policy))
  assert f"1 of 100 samples cannot be used and {done}:\n" in capsys.readouterr().out
  with pytest.raises(DataError, match=r"2 of 100 samples cannot be used \(2.0%\), and data.max_bad_share is 1.0%"):
    stage_data.check_records(*stage_of(tmp_path, 2, 100, on_bad_sample=policy))
  stage_data.check_records(*stage_of(tmp_path, 2, 100, on_bad_sample=policy, max_bad_share=0.02))


def test_many_records_are_shared_by_processes(tmp_path, monkeypatch):
  monkeypatch.setattr("mllm_jax.data.records.CHECKED", 5)
  stage, records = stage_of(tmp_path, 23, 40)
  from mllm_jax.data.records import check

  assert check(records, max_images=1, processes=2) == check(records, max_images=1)
  assert [i for i, _ in check(records, max_images=1, processes=2)] == list(range(23))


def test_numbers_that_cannot_work(tmp_path):
  for options in ({"on_bad_sample": "ignore"}, {"max_bad_share": 1.5}):
    stage, _ = stage_of(tmp_path, 0, 4, **options)
    with pytest.raises(ConfigError, match="must be error, skip or replace"):
      preflight.check_stage("finetune", stage, 1, 1)


def test_every_source_of_a_mix_is_looked_for(tmp_path):
  (tmp_path / "a.json").write_text("[]")
  rows = (("{workdir}/a.json", "{workdir}", "1"), ("tfds:coco:train", "", "0.5"), ("{workdir}/b.json", "", "1"))
  config = Config(stages="pretrain", pretrain=StageConfig(data=DataConfig(mix=rows)))
  config = preflight.in_workdir(config, str(tmp_path))
  found = {item.field: item.path for item in preflight.missing_files(config) if not item.field.startswith("model")}
  assert found == {"pretrain.data.mix[2].path": f"{tmp_path}/b.json"}
