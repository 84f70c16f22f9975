"""tasks/: questions, likelihoods, metrics, download. The slow way, one choice and one token at a
time, is the oracle; what lm-evaluation-harness says is in test_lm_eval.py."""
import dataclasses
import functools
import hashlib
import http.server
import io
import json
import random
import statistics
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch

import eval as evaluation
from bench.harness import FILES, published_rows
from data.tokenizer import BOS, TOKENIZER, load_tokenizer
from plumbing.checkpoint import load_llama
from plumbing.family import open_family
from tasks import download, report
from tasks.likelihood import Request, batches_of, requests_of, score, tokens_computed, tokens_unshared
from tasks.metrics import perplexity_stderr, task_metrics
from tasks.questions import TASKS, Question, load_task
from tasks.report import (
    computed_lines,
    computed_tokens,
    encode_tasks,
    load_questions,
    measure_tasks,
    task_table,
)
from tests.helpers import GQA, make_supernet, one_line_error
from tests.processes import ROOT, run
from tests.tiny_tasks import rows_of_tasks, write_hf, write_jsonl, write_raw

WINDOW = 960


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A supernet, and the tasks' files in both forms."""
    path = tmp_path_factory.mktemp("tasks")
    make_supernet(path / "flex", dataclasses.replace(GQA, context=WINDOW))
    rows = rows_of_tasks()
    write_raw(path / "raw", rows)
    write_hf(path / "hf", rows)
    return path


def requests(desk, name: str, window: int = WINDOW, limit=None):
    """(questions, requests) of a task."""
    questions = load_task(name, desk / "raw", limit)
    return questions, list(requests_of(questions, load_tokenizer(desk / "flex" / TOKENIZER), window))


def slow_answer(model, tokenizer, context: str, continuation: str, window: int,
                **slice_) -> tuple[float, bool]:
    """One forward over all that stands before the last target, as few tokens as the window lets through."""
    bos = tokenizer.encode_single_token(BOS)
    first = [bos, *tokenizer.encode(context.rstrip(), disallowed_special=())]
    whole = [bos, *tokenizer.encode(context + continuation, disallowed_special=())]
    tokens = first + whole[len(first):]
    start = max(0, len(tokens) - window - 1)
    logits, _ = model(torch.tensor([tokens[start:-1]]), **slice_)
    total = 0.0
    greedy = True
    for at in range(len(first), len(tokens)):
        before = logits[0, at - 1 - start].double()  # it has read the tokens up to at - 1
        total += before.log_softmax(-1)[tokens[at]].item()
        greedy = greedy and before.argmax().item() == tokens[at]
    return total, greedy


@pytest.mark.parametrize("name,window", [(n, WINDOW) for n in TASKS] + [("hellaswag", 100), ("mmlu", 40)])
def test_log_likelihoods_are_the_slow_ones(desk, name, window):
    """Catches a prefix longer than what is shared, a cache copied to the wrong rows, padding that
    is read, targets one place off, a window that cuts the wrong end: at a slice with modulation, in
    fp32, to 1e-4."""
    tokenizer = load_tokenizer(desk / "flex" / TOKENIZER)
    model, subnet, factors = open_family(desk / "flex").member(0.5)
    questions, encoded = requests(desk, name, window)
    every = 16 if name in ("hellaswag", "mmlu") else 5
    some = range(1, len(questions), every)
    scores, _ = score(model, [encoded[i] for i in some], subnet, factors, batch=3)
    with torch.no_grad():
        for i, answers in zip(some, scores):
            for pair, (ll, greedy) in zip(questions[i].pairs, answers, strict=True):
                slow, slow_greedy = slow_answer(model, tokenizer, *pair, window,
                                                subnet=subnet, factors=factors)
                assert abs(ll - slow) < 1e-4 * max(1, abs(slow)), questions[i].where
                assert greedy == slow_greedy, questions[i].where


def without_places(questions: list[Question]) -> list[Question]:
    """The questions without the lines that they came from."""
    return [question._replace(where="") for question in questions]


@pytest.mark.parametrize("name", TASKS)
def test_the_harness_is_given_hugging_faces_rows(desk, name):
    """Catches a published file that bench/harness.py rewrites into other rows than Hugging Face's."""
    for split, names in FILES.get(name, {}).items():
        want = [json.loads(line) for line in (desk / "hf" / name / names[1]).read_text().split("\n")[:-1]]
        assert [dict(row) for row in published_rows(name, split, desk / "raw" / name)] == want
        assert [dict(row) for row in published_rows(name, split, desk / "hf" / name)] == want


@pytest.mark.parametrize("name", TASKS)
def test_both_forms_of_a_file_are_one_task(desk, name):
    """Catches a reader of one form that strips, reorders, or counts answers from another number."""
    raw = load_task(name, desk / "raw")
    assert len(raw) >= 30
    assert without_places(raw) == without_places(load_task(name, desk / "hf"))
    assert len(load_task(name, desk / "raw", 4)) == (12 if name == "mmlu" else 4), "--limit is per subject"
    assert load_task(name, desk / "raw", 4)[:4] == raw[:4], "few-shot draws do not depend on --limit"


def test_awkward_rows_are_read_as_they_are(desk):
    """Catches csv split at line ends, labels taken for numbers, blanks lost where the harness keeps them."""
    arc = load_task("arc_easy", desk / "raw")
    assert {len(q.pairs) for q in arc} == {3, 4, 5}
    assert any(q.pairs[1] == q.pairs[2] for q in arc)
    assert any("\n\nAnswer:" in q.pairs[0][0] for q in arc)
    mmlu = load_task("mmlu", desk / "raw")
    assert all(q.pairs[0][0].count("\nC. one\ntwo, three\nD. ") == 6
               for q in mmlu), "5 shots and the question"
    assert all(q.pairs[0][0].count("\nAnswer:") == 6 and q.pairs[0][0].endswith("\nAnswer:") for q in mmlu)
    assert mmlu[20].pairs[0][0].startswith(
        "The following are multiple choice questions (with answers) about high school us history.\n\n")
    (context, after), (other_context, other_after) = load_task("winogrande", desk / "raw")[0].pairs
    assert after == other_after and context != other_context
    assert load_task("hellaswag", desk / "raw")[5].lengths[2] == 0


def test_questions_are_their_rows(tmp_path):
    """Catches lengths in bytes, or with the blank; digits that are not found among the labels; an
    answer counted from another number; a last word split off at another blank; the filled blank
    scored along with what follows it."""
    rows = {"arc_easy/test": dict(
                question="Why?", choices=dict(text=["a", "naïve 日本", "c"], label=["1", "2", "3"]),
                answerKey="2"),
            "lambada_openai/test": dict(text="the dog  ate\nsome\ncake"),
            "piqa/validation": dict(goal="Rest", sol1="sit", sol2="lie 🐈", label=1),
            "winogrande/validation": dict(sentence="Ann saw Bo, _ waved back. ", option1="Ann", option2="Bö",
                                          answer="1")}
    for name, row in rows.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
    zero_shot = [name.split("/")[0] for name in rows]
    found = {name: question for name in zero_shot for question in load_task(name, tmp_path)}
    why = "Question: Why?\nAnswer:"
    rest = "Question: Rest\nAnswer:"
    assert found["arc_easy"][:3] == ([(why, " a"), (why, " naïve 日本"), (why, " c")], [1, 8, 1], 1)
    assert found["lambada_openai"][:3] == ([("the dog ", " ate\nsome\ncake")], [13], 0)
    assert found["piqa"][:3] == ([(rest, " sit"), (rest, " lie 🐈")], [3, 5], 1)
    after = " waved back."
    assert found["winogrande"][:3] == ([("Ann saw Bo, Ann", after), ("Ann saw Bo, Bö", after)], [3, 2], 0)


def test_mmlu_prompts_are_header_shots_and_question(tmp_path):
    """Catches shots from the split that is tested, of another subject, or six of them; no blank
    line between; letters that are counted from another number."""
    def rows_of(split, n, shift):
        return [dict(question=f" {split} {subject} {i}? ", subject=subject,
                     choices=[f"{split}{i}", "b", "c", "d"], answer=(i + shift) % 4)
                for subject in ("old_maps", "new maps") for i in range(n)]

    write_jsonl(tmp_path / "mmlu/dev.jsonl", rows_of("dev", 6, 1))
    write_jsonl(tmp_path / "mmlu/test.jsonl", rows_of("test", 7, 2))
    asked = load_task("mmlu", tmp_path)
    assert [question.gold for question in asked] == [2, 3, 0, 1, 2, 3, 0] * 2
    assert [question.group for question in asked] == ["old_maps"] * 7 + ["new maps"] * 7
    options = "\nB. b\nC. c\nD. d\nAnswer:"
    shots = [f"dev old_maps {i}?\nA. dev{i}{options} {letter}" for i, letter in enumerate("BCDAB")]
    header = "The following are multiple choice questions (with answers) about old maps."
    context = "\n\n".join([header, *shots, f"test old_maps 3?\nA. test3{options}"])
    assert asked[3].pairs == [(context, " A"), (context, " B"), (context, " C"), (context, " D")]


def test_hellaswag_shots_are_one_draw(tmp_path):
    """Catches a generator seeded anew for each row, ten drawn instead of eleven, a row among its
    own shots, an ending that is not the right one, text that is not cleaned."""
    train = [scene(i) for i in range(14)]
    val = [scene(i if i % 2 else 100 + i) for i in range(12)]
    write_jsonl(tmp_path / "hellaswag/train.jsonl", train)
    write_jsonl(tmp_path / "hellaswag/validation.jsonl", val)
    generator = random.Random(1234)
    dropped = 0
    for row, question in zip(val, load_task("hellaswag", tmp_path), strict=True):
        i = int(row["ctx_a"].split()[-1])
        drawn = generator.sample(range(14), 11)
        dropped += i in drawn
        shots = [k for k in drawn if k != i][:10]
        told = [query(k) + f" leaves {k} {k % 4} " for k in shots]
        assert question.pairs[0][0] == "\n\n".join([*told, query(i)])
        assert question.pairs[2][1] == f" leaves {i} 2 " and question.gold == i % 4
    assert dropped > 2


def scene(i: int) -> dict:
    """A row of HellaSwag, with WikiHow's marks."""
    endings = [f"leaves  {i} {k} [step]" for k in range(4)]
    return dict(activity_label=f"[header] Act {i}", ctx_a=f"Someone [title] waits {i}", ctx_b="he",
                label=i % 4, endings=endings)


def query(i: int) -> str:
    """What is asked of it."""
    return f" Act {i}: Someone. waits {i} He"


def test_metrics_are_their_formulas():
    """Catches a tie that goes to the last, lengths with the blank, a population's deviation,
    micro for macro."""
    lls = [[-1.0, -1.0, -3.0], [-2.0, -1.0], [-6.0, -4.0, -9.0, -8.0]]
    scores = [[(ll, False) for ll in row] for row in lls]
    asked = [blank_question(3, 0), blank_question(2, 0), blank_question(4, 0, lengths=[6, 2, 3, 100])]
    found = task_metrics("piqa", asked, scores)
    assert (found["acc"] == pytest.approx(1 / 3) and found["acc_norm"] == pytest.approx(1 / 3)
            and found["n"] == 3)
    assert found["acc_stderr"] == pytest.approx(statistics.stdev([1, 0, 0]) / 3 ** 0.5)
    asked = [blank_question(4, 3, lengths=[6, 2, 3, 100])]
    assert task_metrics("piqa", asked, scores[2:])["acc_norm"] == 1
    asked = [blank_question(2, 1, lengths=[1, 3])]  # 3 a character and 2.2: with the blank 1.5 and 1.6
    assert task_metrics("piqa", asked, [[(-3.0, False), (-6.5, False)]])["acc_norm"] == 1
    # MMLU: in subject a one of three is right, in b both.
    hits = dict(a=[1, 0, 0], b=[1, 1])
    asked = [blank_question(2, hit, subject) for subject, some in hits.items() for hit in some]
    found = task_metrics("mmlu", asked, [[(-2.0, False), (-1.0, False)]] * 5)
    assert found["acc"] == 0.6 and found["acc_macro"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["subjects"] == pytest.approx(dict(a=1 / 3, b=1))
    squares = [(hit - statistics.mean(some)) ** 2 for some in hits.values() for hit in some]
    within = sum(squares) / (5 - 2)
    assert found["acc_stderr"] == pytest.approx((within / 5) ** 0.5)
    of_a = statistics.stdev(hits["a"]) / 3 ** 0.5
    of_b = 0
    assert found["acc_macro_stderr"] == pytest.approx((of_a ** 2 + of_b ** 2) ** 0.5 / 2)


def blank_question(n: int, gold: int, group: str = "", lengths=None) -> Question:
    """A question of n choices without text."""
    return Question([("", "")] * n, lengths or [1] * n, gold, "", group)


def test_perplexity_is_resampled_as_the_harness_does():
    """Catches another generator, seed or order of draws than Python's own random.choices."""
    logs = [-0.5, -3.0, -1.25, -7.0, -2.0]
    found = []
    for seed in range(2):
        generator = random.Random(seed)
        for _ in range(1000):
            found.append(float(np.exp(-statistics.mean(generator.choices(logs, k=5)))))
    assert perplexity_stderr(np.array(logs), 2000) == pytest.approx(statistics.stdev(found))
    scores = [[(ll, ll > -1)] for ll in logs]
    result = task_metrics("lambada_openai", [blank_question(1, 0)] * 5, scores)
    assert result["acc"] == 0.2
    assert result["perplexity"] == pytest.approx(float(np.exp(-statistics.mean(logs))))


def test_tokens_computed_are_counted_and_few(desk, monkeypatch):
    """Catches a prefix computed again for every choice, letters that each take a forward, and a
    count that is not what went through the model: on HellaSwag at least twice fewer than a forward
    for every choice."""
    model = load_llama(desk / "flex")
    seen = []
    forward = type(model).forward

    def counted(self, tokens, *args, **options):
        seen.append(tokens.numel())
        return forward(self, tokens, *args, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    for name, at_least in dict(hellaswag=2.2, mmlu=3.5, arc_easy=2.5, piqa=1.5).items():
        seen.clear()
        questions, encoded = requests(desk, name)
        tasks = {name: (questions[-8:], encoded[-8:])}  # the last row is the long one
        row = measure_tasks(model, tasks, None, None, None, "1.00")
        (name, (computed, alone)), = computed_tokens([row], tasks).items()
        assert computed == sum(seen)
        assert alone >= at_least * computed, name
        assert computed_lines({name: (computed, alone)})[0].startswith(
            f"{name}: {computed:,} tokens computed")
    assert all(len(r.rows) == 1 and len(r.choices) == 4 for r in requests(desk, "mmlu")[1])


def test_sharing_never_costs_more_than_it_saves():
    """Catches batches so large that two answers to a short question, as in PIQA, take more tokens
    than they would if nothing was shared."""
    generator = np.random.default_rng(0)
    asked = []
    for _ in range(60):
        prefix = generator.integers(97, size=generator.integers(8, 20)).tolist()
        rows = [prefix + [answer] * int(generator.integers(5, 40)) for answer in (97, 98)]
        asked.append(Request(rows, [(0, [97]), (1, [98])], len(prefix), False))
    batches = [[asked[i] for i in batch] for batch in batches_of(asked, None)]
    computed = sum(map(tokens_computed, batches))
    assert computed <= 1.05 * sum(tokens_unshared([request]) for request in asked)
    assert len(batches) < 40  # and questions do go together


def test_longest_first(desk):
    """Catches memory that runs out at the end of a long evaluation, and rows that are lost
    or scored twice."""
    encoded = requests(desk, "piqa")[1]
    longest = [max(len(row) for row in r.rows) for r in encoded]
    for batch in (1, 7, None):
        batches = batches_of(encoded, batch)
        order = [i for indices in batches for i in indices]
        assert sorted(order) == list(range(len(encoded)))
        assert [longest[i] for i in order] == sorted(longest, reverse=True)
        assert len(batches[0]) == (batch or len(batches[0])) and len(batches) > 1


def ask(capsys, *argv) -> dict:
    """eval.py --json in this process."""
    capsys.readouterr()
    evaluation.main([str(a) for a in (*argv, "--json")])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("name", TASKS)
def test_batch_sizes_change_nothing(desk, name):
    """Catches an answer that depends on who else is in the batch: rows shorter, longer, with
    another prefix, or cut."""
    model = load_llama(desk / "flex")
    questions, encoded = requests(desk, name, 250)  # short enough for some rows to be cut, and to be quick
    questions, encoded = questions[-10:], encoded[-10:]  # the last row is the long one
    found = {batch: score(model, encoded, batch=batch)[0] for batch in (1, 7, None)}
    flat = {batch: [ll for answers in scores for ll, _ in answers] for batch, scores in found.items()}
    numbers = {batch: task_metrics(name, questions, scores) for batch, scores in found.items()}
    for batch in (7, None):
        assert flat[batch] == pytest.approx(flat[1], abs=1e-4)
        assert all(numbers[batch][k] == pytest.approx(v, rel=1e-4) for k, v in numbers[1].items())


def test_two_ranks_are_one(desk, capsys):
    """Catches rows that two ranks both score or neither, shots drawn by rank, a table or
    JSON printed twice."""
    tasks = ["piqa", "hellaswag", "mmlu"]
    flags = ["--model", desk / "flex", "--budgets", 1, 0.5, "--tasks", *tasks, "--task-dir", desk / "raw",
             "--limit", 3, "--batch", 2]
    rows = ask(capsys, *flags)["rows"]
    assert rows[0]["tasks"] != rows[1]["tasks"] and list(rows[0]["tasks"]) == tasks
    done = run(ROOT / "eval.py", *flags, "--json", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 1 and done.stderr.count("average") == 1
    assert json.loads(done.stdout)["rows"] == rows


def test_budgets_share_the_tokens(desk, capsys, monkeypatch):
    """Catches text tokenised again for every budget; the average is of the metrics in the table;
    no loss unasked."""
    calls = []

    def counted(*args):
        calls.append(args)
        return requests_of(*args)

    monkeypatch.setattr(report, "requests_of", counted)
    result = ask(capsys, "--model", desk / "flex", "--budgets", 1, 0.8, 0.5,
                 "--tasks", "piqa", "hellaswag", "piqa", "--task-dir", desk / "hf", "--limit", 3)
    assert len(calls) == 2 and result["window"] == WINDOW and "loss" not in result["rows"][0]
    for row in result["rows"]:
        assert list(row["tasks"]) == ["piqa", "hellaswag"]
        shown = row["tasks"]["piqa"]["acc"], row["tasks"]["hellaswag"]["acc_norm"]
        assert row["average"] == pytest.approx(sum(shown) / 2)


def test_the_average_is_over_the_papers_metrics(monkeypatch):
    """Catches an average over acc, that of HellaSwag too."""
    figures = dict(piqa=dict(acc=0.5, acc_norm=0.1), hellaswag=dict(acc=0.3, acc_norm=0.8))
    monkeypatch.setattr(report, "score", lambda *_: ([], 5))
    monkeypatch.setattr(report, "task_metrics", lambda name, *_: figures[name])
    row = measure_tasks(None, {name: ([], []) for name in figures}, None, None, None, "1.00")
    assert row == dict(tasks=figures, computed=dict(piqa=5, hellaswag=5), average=pytest.approx(0.65))


def test_the_table_shows_the_papers_metrics(desk, capsys):
    """Catches another metric in the table than in the paper's, a column under another name, a star
    on a budget that was not trained, missing subjects and cut contexts that nobody hears of."""
    questions = load_questions(["mmlu", "hellaswag"], desk / "raw", 4)
    capsys.readouterr()
    tasks = encode_tasks(questions, load_tokenizer(desk / "flex" / TOKENIZER), 200)
    said = capsys.readouterr().err
    assert "mmlu: 3 subjects of 57 are there" in said
    assert "hellaswag: 4 of 4 contexts lost their beginning to the window of 200 tokens" in said
    row = measure_tasks(load_llama(desk / "flex"), tasks, None, None, None, "1.00")
    sizes = dict(got=1.0, params=1234)
    head, first, second = task_table([dict(budget=1.0, **sizes, **row), dict(budget=0.7, **sizes, **row)],
                                     [1.0]).splitlines()
    assert head.split() == ["budget", "got", "parameters", "mmlu", "hellaswag", "average"]
    acc = row["tasks"]["mmlu"]["acc"]
    acc_norm = row["tasks"]["hellaswag"]["acc_norm"]
    assert first.split()[:3] == ["1.00*", "1.000", "1,234"] and second.split()[0] == "0.70!"
    assert first.split()[3].startswith(f"{acc:.4f}±") and first.split()[4].startswith(f"{acc_norm:.4f}±")
    assert first.split()[5] == f"{(acc + acc_norm) / 2:.4f}"


# -----------------------------------------------------------------------------
# mistakes


BAD = {"json": ("piqa/valid.jsonl", 3, '{"goal": "x", ', "JSON"),
       "a list": ("piqa/valid.jsonl", 3, "[1, 2]", "JSON"),
       "deep": ("winogrande/dev.jsonl", 2, '{"sentence": ' + "[" * 100_000, "JSON"),
       "not utf-8": ("lambada_openai/lambada_test.jsonl", 2, b'{"text": "na\xefve"}', "UTF-8"),
       "no text": ("lambada_openai/lambada_test.jsonl", 4, '{"txt": "a b"}', "text"),
       "no goal": ("piqa/valid.jsonl", 5, '{"sol1": "a", "sol2": "b"}', "goal"),
       "label": ("piqa/valid-labels.lst", 7, "2", "label"),
       "no blank": ("winogrande/dev.jsonl", 2,
                    '{"sentence": "a b", "option1": "a", "option2": "b", "answer": "1"}', "'_'"),
       "answer": ("winogrande/dev.jsonl", 2,
                  '{"sentence": "a _", "option1": "a", "option2": "b", "answer": "3"}', "answer"),
       "no answer": ("winogrande/dev.jsonl", 2,
                     '{"sentence": "a _", "option1": "a", "option2": "b"}', "answer"),
       "key": ("arc_easy/ARC-Easy-Test.jsonl", 6,
               '{"question": {"stem": "a", "choices": [{"text": "b", "label": "A"}, '
               '{"text": "c", "label": "B"}]}, "answerKey": "C"}', "answerKey"),
       "choices": ("arc_easy/ARC-Easy-Test.jsonl", 6,
                   '{"question": {"stem": "a", "choices": 3}, "answerKey": "A"}', "text"),
       "endings": ("hellaswag/hellaswag_val.jsonl", 3,
                   '{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": '
                   '[1, 2], "label": 0}', "endings"),
       "scene": ("hellaswag/hellaswag_train.jsonl", 3,
                 '{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": '
                 '["x", "y", "z", "w"], "label": 4}', "label"),
       "three endings": ("hellaswag/hellaswag_val.jsonl", 3,
                         '{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", '
                         '"endings": ["x", "y", "z"], "label": 1}', "four strings"),
       "letter": ("mmlu/test/anatomy_test.csv", 1, "q,a,b,c,d,E", "columns"),
       "columns": ("mmlu/dev/anatomy_dev.csv", 1, "q,a,b,c,A", "columns"),
       "csv": ("mmlu/test/anatomy_test.csv", 1, b"q\xff,a,b,c,d,A", "UTF-8")}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_name_file_and_line(desk, tmp_path, capsys, case):
    """Catches a traceback, or a row that is skipped or counted wrong without a word."""
    name, line, text, word = BAD[case]
    write_raw(tmp_path / "raw", rows_of_tasks())
    path = tmp_path / "raw" / name
    lines = path.read_bytes().split(b"\n")
    lines[line - 1] = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(b"\n".join(lines))
    with one_line_error(capsys, f"{path}:{line}:", word, "python -m tasks.download"):
        load_task(name.split("/")[0], tmp_path / "raw", 1)


def test_lines_of_a_csv_are_counted_across_quotes(tmp_path, capsys):
    """Catches the number of the record in place of the line, after rows with line ends inside."""
    write_raw(tmp_path, rows_of_tasks())
    path = tmp_path / "mmlu/test/anatomy_test.csv"
    good = path.read_text().count("\n")
    path.write_text(path.read_text() + "q,a,b\n")
    with one_line_error(capsys, f"{path}:{good + 1}:"):
        load_task("mmlu", tmp_path)


@pytest.mark.parametrize("name", TASKS)
def test_missing_files(desk, tmp_path, capsys, name):
    """Catches a traceback where a line should say which file, where it is looked for, and where
    people get it."""
    mend = f"python -m tasks.download {name} --out {tmp_path}"
    with one_line_error(capsys, str(tmp_path / name), mend, TASKS[name].source):
        load_questions([name], tmp_path)


def test_names_of_tasks(desk, capsys):
    """Catches a traceback for an unknown task, a task that is scored twice, "all" that is not all."""
    with one_line_error(capsys, "sudoku", *TASKS, "all"):
        load_questions(["piqa", "sudoku"], desk / "raw")
    assert list(load_questions(["piqa", "mmlu", "piqa"], desk / "raw", 1)) == ["piqa", "mmlu"]
    assert list(load_questions(["piqa", "all"], desk / "raw", 1)) == list(TASKS)


def test_incomplete_tasks(desk, tmp_path, capsys):
    """Catches labels that belong to other rows, shots that are too few, an empty file, an answer
    over the window."""
    write_raw(tmp_path, rows_of_tasks())
    (tmp_path / "piqa/valid-labels.lst").write_text("0\n1\n")
    with one_line_error(capsys, "valid-labels.lst:2:", "32 rows"):
        load_task("piqa", tmp_path)
    (tmp_path / "mmlu/dev/anatomy_dev.csv").write_text("q,a,b,c,d,A\n" * 4)
    with one_line_error(capsys, "4 dev rows of anatomy"):
        load_task("mmlu", tmp_path)
    (tmp_path / "hellaswag/hellaswag_train.jsonl").write_text("")
    with one_line_error(capsys, "hellaswag_train.jsonl", "11 rows"):
        load_task("hellaswag", tmp_path)
    (tmp_path / "winogrande/dev.jsonl").write_text("")
    with one_line_error(capsys, "winogrande", "no rows"):
        load_task("winogrande", tmp_path)
    with one_line_error(capsys, "lambada_test.jsonl:", "window", "--seq-len"):
        questions = load_questions(["lambada_openai"], tmp_path)
        encode_tasks(questions, load_tokenizer(desk / "flex" / TOKENIZER), 1)


# -----------------------------------------------------------------------------
# downloads


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` from memory; breaks off after `cut` bytes once; notes what ranges were asked for."""
    files, cut, ranges = {}, None, []

    def do_GET(self):
        data, asked = self.files.get(self.path), self.headers.get("Range")
        self.ranges.append(asked)
        if data is None:
            return self.send_error(404)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        cut, Server.cut = Server.cut, None
        self.wfile.write(data[start:cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """Its address; it listens on this machine only."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as listening:
        Server.files, Server.cut, Server.ranges = {}, None, []
        threading.Thread(target=functools.partial(listening.serve_forever, 0.02), daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def archive(kind: str, files: dict[str, bytes]) -> bytes:
    """A zip or tar of files, in memory."""
    packed = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(packed, "w") as out:
            for name, data in files.items():
                out.writestr(name, data)
    else:
        with tarfile.open(fileobj=packed, mode="w") as out:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def test_downloads_go_on_where_they_stopped(server, tmp_path, monkeypatch, capsys):
    """Catches half a file under its name, a download that starts again, a damaged one that is kept,
    a second one when all is there."""
    data = bytes(range(256)) * 2000
    Server.files, Server.cut = {"/lambada_test.jsonl": data}, 300_000
    source = download.Source(f"{server}/lambada_test.jsonl", len(data), hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(download.SOURCES, "lambada_openai", [source])
    flags = ["lambada_openai", "--out", str(tmp_path)]
    with one_line_error(capsys, "lambada_test.jsonl", "run it again"):
        download.main(flags)
    assert [p.name for p in (tmp_path / "lambada_openai").iterdir()] == [".lambada_test.jsonl.part"]
    download.main(flags)
    download.main(flags)
    assert Server.ranges == [None, "bytes=300000-"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "lambada_openai").iterdir()} == {
        "lambada_test.jsonl": data}
    Server.files = {"/lambada_test.jsonl": data[::-1]}
    with one_line_error(capsys, "SHA-256", source.sha256):
        download.main([*flags[:2], str(tmp_path / "other")])
    assert not (tmp_path / "other" / "lambada_openai").exists()
    Server.files = {}
    with one_line_error(capsys, "404"):
        download.main([*flags[:2], str(tmp_path / "other")])
    with one_line_error(capsys, "sudoku", "piqa"):
        download.main(["sudoku"])


def test_archives_become_what_is_read(server, desk, tmp_path, monkeypatch, capsys):
    """Catches members under other names than questions.py looks for, an archive left behind, paths
    that lead outside."""
    raw = {str(p.relative_to(desk / "raw")): p.read_bytes() for p in (desk / "raw").rglob("*") if p.is_file()}
    packed = {"piqa": ("zip", {"physicaliqa-train-dev/dev.jsonl": raw["piqa/valid.jsonl"], "../evil": b"",
                               "physicaliqa-train-dev/dev-labels.lst": raw["piqa/valid-labels.lst"]}),
              "winogrande": ("zip", {"winogrande_1.1/dev.jsonl": raw["winogrande/dev.jsonl"],
                                     "winogrande_1.1/a": b""}),
              "arc_easy": ("zip", {f"ARC-V1-Feb2018-2/{name}".replace("arc_easy", "ARC-Easy"): data
                                   for name, data in raw.items() if "arc_easy" in name}),
              "mmlu": ("tar", {name.replace("mmlu", "data", 1): data
                               for name, data in raw.items() if "mmlu" in name})}
    for task, (kind, files) in packed.items():
        source, = download.SOURCES[task]
        assert source.url.startswith("https://")
        name = source.url.rsplit("/")[-1]
        Server.files[f"/{name}"] = archive(kind, files)
        monkeypatch.setitem(download.SOURCES, task,
                            [source._replace(url=f"{server}/{name}", size=None, sha256=None)])
    for _ in range(2):
        download.main([*packed, "--out", str(tmp_path)])
    assert len(Server.ranges) == 4
    for task in packed:
        assert without_places(load_task(task, tmp_path)) == without_places(load_task(task, desk / "raw"))
    assert not [p for p in tmp_path.rglob("*")
                if p.name == "evil" or p.name.endswith((".part", ".tmp", ".zip"))]
    # What was deleted comes again.
    (tmp_path / "winogrande/dev.jsonl").unlink()
    download.main([*packed, "--out", str(tmp_path)])
    assert len(Server.ranges) == 5 and (tmp_path / "winogrande/dev.jsonl").is_file()


def test_a_bad_archive_does_not_stay(server, tmp_path, monkeypatch, capsys):
    """Catches a damaged archive that is unpacked again and again, one that fills the disk, and a
    download without end."""
    source, = download.SOURCES["winogrande"]
    monkeypatch.setitem(download.SOURCES, "winogrande", [source._replace(url=f"{server}/winogrande_1.1.zip")])
    monkeypatch.setattr(download, "MOST", 9_000)
    good = archive("zip", {"winogrande_1.1/dev.jsonl": b"{}" * 1000})
    flipped = bytearray(good)
    flipped[100] ^= 1
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("winogrande_1.1/dev.jsonl", b"0" * 9_001)
    bomb = packed.getvalue()
    bad = {"no archive": b"<html>", "flipped": bytes(flipped), "cut": good[:-30],
           "cut inside": bomb[:45] + bomb[60:],
           "other": archive("zip", {"elsewhere/dev.jsonl": b"{}"}), "bomb": bomb, "endless": b"0" * 9_001}
    for name, data in bad.items():
        Server.files["/winogrande_1.1.zip"] = data
        with one_line_error(capsys, "winogrande_1.1.zip", "run it again"):
            download.main(["winogrande", "--out", str(tmp_path)])
        assert not (tmp_path / "winogrande").exists(), name
    Server.files["/winogrande_1.1.zip"] = good
    download.main(["winogrande", "--out", str(tmp_path)])
    assert (tmp_path / "winogrande/dev.jsonl").read_bytes() == b"{}" * 1000
