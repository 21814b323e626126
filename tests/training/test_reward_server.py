"""Runs and evaluations that start the server of their own reward model. The server here is a script that scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_gspo.cli import main
from megatron_gspo.report.status import summarise
from tests.pool import RankPool
from tests.rollout.test_launcher import fake_python
from tests.training.conftest import QUICKSTART
from tests.training.stand_in import StandIn
from tests.training.test_faults import UNCHECKED, ending

pytestmark = pytest.mark.timeout(500)

SCORER = """
import http.server, json, os, pathlib, sys, threading
home, key = pathlib.Path(__file__).parent, os.environ["MEGATRON_GSPO_SERVER_KEY"]
one_counts = threading.Lock()
(home / "arguments").write_text(json.dumps(sys.argv[1:]))
with (home / "started").open("a") as file:
    print(os.getpid(), os.environ["TMPDIR"], file=file)
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.answer(b"", 200 if self.path == "/health_generate" else 404)
    def do_POST(self):
        ids = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input_ids"]
        if self.headers["Authorization"] != f"Bearer {key}" or self.path != "/classify":
            return self.answer(b"", 401)
        with one_counts:  # of two requests at once neither would read DIES_AT
            with (home / "asked").open("a") as file:
                print(len(ids), file=file)
            if (home / "asked").read_text().count("\\n") == DIES_AT:
                os._exit(9)
        body = {"embedding": [len(ids) / 7], "meta_info": {"prompt_tokens": len(ids)}}
        self.answer(json.dumps(body).encode(), 200)
    def answer(self, body, status):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
"""Scores a text by its length; it ends at request DIES_AT."""
RESPONSES = 4 * 8
"""Of an outer step."""
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def directory(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model's directory: the quickstart's tokenizer with a chat template, and what it says it is."""
    found = tmp_path_factory.mktemp("reward-model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (found / name).write_bytes((quickstart / "model" / name).read_bytes())
    (found / "chat_template.jinja").write_text(TEMPLATE)
    (found / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    return found


@pytest.fixture
def own(overrides: list[str], directory: Path, tmp_path: Path) -> list[str]:
    """The cut quickstart, graded by a reward model that it starts itself."""
    few = ["parallel.tensor=1", "parallel.expert=1", "train.noise_floor_every=0", "eval.every=0", "train.save_hf=false"]
    graded = [
        'reward.function="reward_model"',
        "reward.options={ check = false }",
        "reward.check_references=0",
        f'reward_server.model="{directory}"',
        "reward_server.restarts=1",
        "reward_server.start_s=200",
        "train.save_rollouts=100",
    ]
    return [*overrides, *few, *UNCHECKED, *graded]


def started(home: Path) -> Iterator[tuple[int, Path]]:
    """(process, its directory of temporary files) of each start."""
    for line in (home / "started").read_text().splitlines():
        pid, files = line.split()
        yield int(pid), Path(files)


def test_a_run_starts_its_reward_model_and_goes_on_when_that_dies(
    ranks: RankPool, own: list[str], quickstart: Path, directory: Path, tmp_path: Path
) -> None:
    python = fake_python(tmp_path, SCORER.replace("DIES_AT", str(RESPONSES + 5)))
    with StandIn(quickstart / "model") as server:
        settings = [
            *own,
            f'rollout.servers=["{server.url}"]',
            'sync.method="tensor"',
            f'rollout.server_python="{python}"',
        ]
        assert ranks.run(2, ending, settings) == ["finished"] * 2
    arguments = json.loads((tmp_path / "arguments").read_text())
    assert arguments[arguments.index("--model-path") + 1] == str(directory)
    assert "--is-embedding" in arguments and "--enable-deterministic-inference" not in arguments
    logs = tmp_path / "run" / "reward_servers"
    assert {path.name for path in logs.iterdir()} == {"sglang-0.log", "sglang-0.1.log"}, "and the key is gone"
    port = arguments[arguments.index("--port") + 1]
    assert summarise(tmp_path / "run")["reward_servers"] == [{"url": f"http://127.0.0.1:{port}"}]
    (first, files), (second, more) = started(tmp_path)
    assert not (files.exists() or more.exists() or psutil.pid_exists(first) or psutil.pid_exists(second))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["dropped/ungraded"] == 0.0 for line in lines)
    kept = [
        json.loads(line) for path in (tmp_path / "run" / "rollouts").iterdir() for line in path.read_text().splitlines()
    ]
    assert len(kept) == 2 * RESPONSES // 2, "of each step the first leader's half"
    for response in kept:  # a character is a token of the reward model's tokenizer
        length = len(response["prompt"]) + len(response["response"])
        assert response["reward"] == response["components"]["score"] == pytest.approx(length / 7, abs=1e-15)
    assert (tmp_path / "asked").read_text().count("\n") > 2 * RESPONSES, "what was lost was asked again"


def test_an_evaluation_starts_the_reward_model_that_it_asks(
    own: list[str], quickstart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = fake_python(tmp_path, SCORER.replace("DIES_AT", "-1"))
    out = tmp_path / "out"
    with StandIn(quickstart / "model") as server:
        more = [f'rollout.servers=["{server.url}"]', f'rollout.server_python="{python}"', "eval.prompts=4"]
        arguments = [str(QUICKSTART / "gspo.toml"), *own, *more, "--out", str(out), "--json"]
        assert main(["eval", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["reward"]["server"]["kind"] == "reward_model"
    kept = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    scores = [response["components"]["score"] for response in kept]
    assert len(scores) == 4 and min(scores) > 1.0
    ((scorer, files),) = started(tmp_path)
    assert not (files.exists() or psutil.pid_exists(scorer) or (out / "reward_servers" / "key").exists())
