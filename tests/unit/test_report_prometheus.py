"""What Prometheus reads of a run, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from megatron_gspo.errors import ConfigError
from megatron_gspo.report.metrics import LAYER, METRICS
from megatron_gspo.report.prometheus import OWN, PREFIX, PrometheusSink, Series, help_texts, page, series_name
from megatron_gspo.report.ranks import sign_of, write_sign
from megatron_gspo.report.rundir import RunDirectory, initial_evaluation
from megatron_gspo.rollout.sglang.launcher import find_server_python, free_ports
from megatron_gspo.types import StepReport
from tests.rollout.conftest import require_sglang
from tests.unit.report_runs import make_config

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "dashboard.json"
SAMPLE = re.compile(r'([a-z_0-9]+)(\{(?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+\})? (\S+)')


def free_port() -> int:
    """Below those that whoever asks for any port gets, so that it stays free until it is listened on."""
    return free_ports(1)[0]


def sink_of(tmp_path: Path, address: str) -> PrometheusSink:
    config = make_config(tmp_path / "run", train={"metrics_address": address})
    return PrometheusSink(RunDirectory.create(config), config, 2)


def read(sink: PrometheusSink, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://{sink.address}{path}", timeout=10) as reply:
        assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return str(reply.read().decode())


def samples(text: str) -> dict[str, float]:
    found = {}
    for line in text.splitlines():
        if not line.startswith("# "):
            match = SAMPLE.fullmatch(line)
            assert match, line
            found[match[1] + (match[2] or "")] = float(match[3])
    return found


def test_the_latest_of_each_number_is_there_with_what_it_means(tmp_path: Path) -> None:
    sink = sink_of(tmp_path, f":{free_port()}")
    try:
        sink.write(initial_evaluation({"eval/accuracy": 0.25}))
        sink.write(StepReport(step=0, outer_step=0, minibatch=0, metrics={"loss": 0.5, "reward/mean": 0.75}))
        sink.write(StepReport(step=1, outer_step=0, minibatch=1, metrics={"loss": -1.5, "grad_norm": float("nan")}))
        write_sign(tmp_path / "run", sign_of(0, 'no"de\\', "train", 1, 0.0))
        text = read(sink)
    finally:
        sink.close()
    found = samples(text)
    assert {name: found[PREFIX + name] for name in ("loss", "reward_mean", "eval_accuracy")} == {
        "loss": -1.5,
        "reward_mean": 0.75,
        "eval_accuracy": 0.25,
    }
    assert PREFIX + "grad_norm" not in found
    assert [found[PREFIX + name] for name in ("optimizer_steps", "outer_steps", "outer_steps_planned")] == [2, 1, 12]
    assert found[f'{PREFIX}rank_up{{rank="0",host="no\\"de\\\\"}}'] == 1
    assert found[f'{PREFIX}rank_up{{rank="1",host=""}}'] == 0
    assert f"# HELP {PREFIX}reward_mean {METRICS['reward/mean'].meaning} (reward)\n" in text
    assert text.count(f"# TYPE {PREFIX}rank_up gauge\n") == 1


def test_it_listens_on_loopback_unless_told_otherwise_and_ends_with_the_run(tmp_path: Path) -> None:
    port = free_port()
    sink = sink_of(tmp_path, f":{port}")
    assert sink.address == f"127.0.0.1:{port}"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        read(sink, "/")
    sink.close()
    with pytest.raises(OSError, match="refused"):
        read(sink)


def test_an_address_that_is_taken_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f'train.metrics_address = "{address}" cannot be listened on: .*in use'):
            sink_of(tmp_path, address)


@pytest.mark.parametrize(
    "address", ["9100", "localhost", ":0", ":70000", "a b:1", "u@h:1", "h:1/x", "http://h:1", "h:"]
)
def test_what_is_no_address_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="metrics_address"):
        make_config(tmp_path / "run", train={"metrics_address": address})


def test_every_name_is_prometheus_and_no_two_metrics_share_one() -> None:
    names = [series_name(name.replace(LAYER, "layer_00"))[0] for name in METRICS]
    assert all(re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name) for name in [*names, *OWN])
    assert len({*names, *OWN}) == len(METRICS) + len(OWN)
    assert set(help_texts()) == {*names, *OWN}


def test_the_documentation_has_the_same_words() -> None:
    page_text = (DASHBOARD.parents[2] / "docs" / "watching.md").read_text()
    assert all(f"| `{PREFIX}{name}` | {text} |" in page_text for name, text in OWN.items())


def test_whatever_a_label_holds_a_line_stays_a_line() -> None:
    text = page(
        [("info", {"run": 'a"b\\c\nd\ud800', "model": ""}, 1.0), ("loss", {}, 1e-9), ("info", {"run": "x"}, 1.0)]
    )
    assert len(samples(text)) == 3
    assert text.count("# TYPE") == 2


READ = """
import json, sys
from prometheus_client.parser import text_string_to_metric_families
found = [
    [family.name, family.type, family.documentation, [[s.name, s.labels, repr(s.value)] for s in family.samples]]
    for family in text_string_to_metric_families(sys.stdin.read())
]
print(json.dumps(found))
"""
Family = tuple[str, str, str, list[tuple[str, dict[str, str], str]]]


def as_prometheus_reads(text: str) -> list[Family]:
    """By the parser of Prometheus' own client, which SGLang's environment has: (name, type, help, samples)."""
    require_sglang()
    command = [str(find_server_python()), "-I", "-c", READ]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=True)
    return [tuple(family) for family in json.loads(done.stdout)]  # type: ignore[misc]


def test_prometheus_own_parser_reads_what_was_written() -> None:
    strange = ['a"b', "c\\d", "e\nf", "g\\nh", 'i\\"j', '{k="l"}', "m,n}", " # o ", "\u00e9\u4e2d", ""]
    series: list[Series] = [("info", {"run": text, "model": "m"}, 1.0) for text in strange]
    numbers = [0.0, -1.5, 1e-300, 1e300, 0.1, 123456789.0, float("inf"), float("-inf"), float("nan")]
    series += [("route_drift_layer", {"layer": f"{index:02d}"}, value) for index, value in enumerate(numbers)]
    series += [("loss", {}, 0.25), ("info", {"run": "last"}, 1.0)]
    info, drift, loss = as_prometheus_reads(page(series))
    assert (info[0], info[1], info[2]) == (f"{PREFIX}info", "gauge", OWN["info"])
    assert [labels["run"] for _, labels, _ in info[3]] == [*strange, "last"], "one family, in order"
    assert [value for _, _, value in drift[3]] == [repr(value) for value in numbers]
    assert loss[3] == [[f"{PREFIX}loss", {}, "0.25"]]


def test_it_reads_every_metric_as_a_gauge_of_its_own_with_its_help() -> None:
    texts = help_texts()
    found = as_prometheus_reads(page([(name, {}, 1.0) for name in texts]))
    assert {name: said for name, _, said, _ in found} == {PREFIX + name: said for name, said in texts.items()}
    assert {kind for _, kind, _, _ in found} == {"gauge"} and all(len(samples) == 1 for *_, samples in found)
    endings = ("_total", "_count", "_sum", "_bucket", "_created")
    assert not [name for name in texts if name.endswith(endings)], "these are of counters, summaries and histograms"


def test_the_dashboard_asks_for_numbers_that_there_are() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    names = {name for text in asked for name in re.findall(rf"{PREFIX}(\w+)", text)}
    assert len(names) > 20 and names <= set(help_texts())
    assert all(panel["title"] for panel in dashboard["panels"])
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
