"""memory.py: the plan against what a run takes, and against arithmetic."""
import dataclasses
import json
import shutil
import sys

import pytest
import torch

import plumbing.memory as memory
import plumbing.settings as settings
import train
from plumbing.checkpoint import save_llama
from model import LlamaConfig, SubNet
from plumbing.params import params_json
from space import n_params
from tests.helpers import GQA, one_line_error, random_llama
from tests.processes import run_afresh

SMALL = LlamaConfig(dim=384, n_layers=6, n_heads=6, n_kv_heads=3, head_dim=64, ffn_dim=1152, vocab_size=1280)
MEASURE = r"""
import re, sys, torch, train
from model import Llama, LlamaConfig

peak = lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
setup, finish, train.show_family = train.setup, train.finish, lambda *args: None

def begin(device):
    # What torch, gloo and the first step of all load for themselves is code, and no part of the plan.
    global before
    device, llama = setup(device), Llama(LlamaConfig(dim=64, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=64))
    tokens = torch.zeros(2, 128, dtype=torch.long)
    llama(tokens, tokens)[1].backward()
    torch.optim.AdamW(llama.parameters()).step()
    before = peak()
    return device

def end():
    sys.stdout.write(f"took {peak() - before}\n")
    sys.stdout.flush()
    finish()

train.setup, train.finish = begin, end
train.main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ranks,extra", [
    (0, ""), (0, "--activation-checkpointing --batch-tokens 512"), (0, "--kd 0.5"),
    (0, "--kd 0.5 --batch-tokens 4096"), (2, "--shard ddp --kd 0.5"), (2, "--shard zero1 --kd 0"),
    (2, "--shard fsdp --kd 0.5"), (4, "--shard fsdp --kd 0")])
def test_the_plan_is_what_a_run_takes(demo, tmp_path, ranks, extra):
    """Catches a plan that forgets a copy, or counts one that is never made: within
    10 % of the measured peak."""
    root, _ = demo
    shutil.copytree(root / "data", tmp_path / "data")
    (tmp_path / "data/tokenizer.model").unlink()
    save_llama(tmp_path / "base", SMALL, random_llama(SMALL).state_dict())
    flags = [f"--llama={tmp_path}/base", f"--data={tmp_path}/data", f"--out={tmp_path}/flex", "--steps", "2",
             "--batch-tokens", str(256 * max(ranks, 1)), "--seq-len", "128", "--budgets", "1.0", "0.6",
             "--eval-windows", "2", "--calibration-windows", "2", "--depth-by", "influence",
             "--router-start", "0", "--teach-end", "1", "--device", "cpu", *extra.split()]
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    # glibc would keep what was freed, and it would count as taken.
    done = run_afresh(script, *flags, ranks=ranks, MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr[-2000:]
    measured = [int(words[1]) for words in map(str.split, done.stdout.splitlines()) if words[:1] == ["took"]]
    assert len(measured) == max(ranks, 1)
    args = settings.parse_args(flags)
    planned = {row["shard"]: row["total"]
               for row in memory.plan(SMALL, args, max(ranks, 1), bf16=False)}[args.shard]
    # RESULTS has these: pytest -s
    print(f"{ranks} {extra}: {[m // 10**6 for m in measured]} MB, planned {planned // 10**6}")
    assert abs(planned / max(measured) - 1) < 0.1, (planned / 1e6, max(measured) / 1e6)


def test_a_teacher_is_its_weights_and_three_times_the_logits():
    """Catches a plan in which a teacher has no logits: with a large vocabulary they are most of it.
    Its logits, their softmax, and its product with the student's are there at once."""
    config = dataclasses.replace(GQA, vocab_size=50_000)
    weights = 4 * n_params(config, SubNet.full(config), embeddings=True)
    for tokens, in_chunk in ((256, 256), (4096, 1024)):
        teacher = {}
        for kd in ("0", "0.5"):
            args = settings.parse_args(["--kd", kd, "--seq-len", "32", "--batch-tokens", str(tokens)])
            teacher[kd] = memory.plan(config, args, 1, bf16=False)[0]["teacher"]
        logits, states = 4 * in_chunk * 50_000, 4 * tokens * config.dim
        assert teacher == {"0": 0, "0.5": weights + 3 * logits + states}


def test_what_the_forward_keeps():
    """Catches bytes that are counted twice, views of weights taken for activations, and depth that
    costs nothing: the real forward, tensor by tensor, must keep as much."""
    for checkpointing in (False, True):
        model = random_llama(dataclasses.replace(GQA, n_layers=3))
        model.activation_checkpointing = checkpointing
        weights, kept = {p.data_ptr() for p in model.parameters()}, {}

        def keep(t):
            kept[t.untyped_storage().data_ptr()] = t
            return t

        x = torch.zeros(2, 16, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(x, x)
        real = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in weights)
        planned = memory.activation_bytes(model.config, 2, 16, False, checkpointing, False)
        assert planned == real if not checkpointing else real < planned < 3 * real


def test_the_table_from_params_json_alone(tmp_path, capsys):
    """Catches a plan that wants weights, a total that is not the sum, shares that do
    not fall with the ranks."""
    config = LlamaConfig(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, ffn_dim=8192,
                         vocab_size=128256)
    (tmp_path / "params.json").write_text(json.dumps(params_json(config)))
    rows = {}
    for ranks in ("1", "8"):
        train.main(["--llama", str(tmp_path), "--dry-run", "--ranks", ranks, "--device", "cuda"])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
        rows[ranks] = {kind: list(map(float, cells)) for kind, *cells in lines}
    assert not (tmp_path / "consolidated.00.pth").exists() and len(list(tmp_path.iterdir())) == 1
    n = n_params(config, SubNet.full(config), embeddings=True)
    for ranks, table in rows.items():
        assert list(table) == ["ddp", "zero1", "fsdp"]
        assert table["ddp"][:3] == pytest.approx([4 * n / 1e9, 4 * n / 1e9, 8 * n / 1e9], abs=0.01)
        assert all(sum(row[:-1]) == pytest.approx(row[-1], abs=0.03) for row in table.values())
    assert rows["1"]["ddp"] == rows["1"]["fsdp"] == rows["1"]["zero1"]
    assert rows["8"]["zero1"][2] == pytest.approx(rows["8"]["ddp"][2] / 8, abs=0.01)
    # Under fsdp two blocks, and what lies outside of them, are there in bf16, with their gradients;
    # one block's gradient is in fp32 too.
    block = n_params(config, SubNet.uniform(2048, [0], 32, 8192))
    outside = 2 * 128256 * 2048 + 2048
    gradients = 4 * n / 8 + 2 * (block + outside) + 4 * block
    assert rows["8"]["fsdp"][:2] == pytest.approx(
        [(4 * n / 8 + 2 * (2 * block + outside)) / 1e9, gradients / 1e9], abs=0.01)
    assert rows["8"]["fsdp"][-1] < rows["8"]["zero1"][-1] < rows["8"]["ddp"][-1]
    for choices, words in (("--n-layers-choices 17", "17"), ("--budgets 1.0 0.00001", "1e-05")):
        with one_line_error(capsys, words):  # as training would
            train.main(["--llama", str(tmp_path), "--dry-run", *choices.split()])
    with one_line_error(capsys, "another shape in every layer"):
        (tmp_path / "per-layer").mkdir()
        mixed = dataclasses.replace(config, ffn_dim=(8192,) * 15 + (4096,))
        (tmp_path / "per-layer/params.json").write_text(json.dumps(params_json(mixed)))
        train.main(["--llama", str(tmp_path / "per-layer"), "--dry-run"])
    with one_line_error(capsys, "3 ranks", "--batch-tokens"):
        train.main(["--llama", str(tmp_path), "--dry-run", "--ranks", "3"])


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_there_say_whether_they_are_tied(tmp_path, capsys, tied):
    """Catches a plan that counts the embeddings of a tied Llama twice: params.json does not
    say it, the weights do."""
    config = dataclasses.replace(GQA, tied=tied)
    save_llama(tmp_path, config, random_llama(config).state_dict())
    assert "tied" not in json.loads((tmp_path / "params.json").read_text())
    train.main(["--llama", str(tmp_path), "--dry-run"])
    n = n_params(config, SubNet.full(config), embeddings=True)
    assert f"; {n:,} parameters; " in capsys.readouterr().out
