"""File, environment, annotations, flags: precedence, origins, and every problem told with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from interceptor.config import FIELD, FIELDS, Config, Field
from interceptor.errors import ConfigError, Problem
from interceptor.sources import Resolved, from_environment, local_names, resolve
from interceptor.values import IdRange, Mark
from tests.property.strategies import configs, malformed_texts

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file; its path."""

    def put(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return put


def resolved(**sources: Any) -> Resolved:
    return resolve(**({"environment": {}} | sources))


def problems_of(**sources: Any) -> tuple[Problem, ...]:
    try:
        resolved(**sources)
    except ConfigError as error:
        return error.problems
    return ()


def refused(**sources: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        resolved(**sources)
    return [str(problem) for problem in error.value.problems]


def texts(config: Config) -> dict[str, str]:
    return {row.name: row.kind.show(getattr(config, row.name)) for row in FIELDS}


@given(configs())
def test_every_option_comes_back_from_flags(config: Config) -> None:
    assert resolved(flags={name: [text] for name, text in texts(config).items()}).config == config


@given(configs())
def test_every_option_comes_back_from_the_environment(config: Config) -> None:
    assert resolved(environment={FIELD[name].env: text for name, text in texts(config).items()}).config == config


@given(configs())
def test_every_option_comes_back_from_annotations(config: Config) -> None:
    assert resolved(annotations={FIELD[name].annotation: text for name, text in texts(config).items()}).config == config


@given(config=configs(), dump=st.sampled_from((json.dumps, yaml.safe_dump)))
def test_every_option_comes_back_from_a_file(tmp_path_factory: pytest.TempPathFactory, config: Config, dump: Any) -> None:
    path = tmp_path_factory.mktemp("config") / "config"
    path.write_text(dump(texts(config)))

    assert resolved(files=[str(path)]).config == config


def test_without_sources_all_is_default() -> None:
    found = resolved()

    assert found.config == Config()
    assert set(found.origin.values()) == {"default"}


def test_precedence_is_default_file_environment_annotation_flag(write: Write) -> None:
    first = write("first.yaml", "dns_port: 1\noutbound_port: 1\ninbound_port: 1\ntunnel_port: 1\nprobe_port: 1")
    second = write("second.json", '{"outbound-port": 2, "inbound-port": 2, "tunnel-port": 2, "probe-port": 2}')

    found = resolved(
        files=[first, second],
        environment={"INTERCEPTOR_INBOUND_PORT": "3", "INTERCEPTOR_TUNNEL_PORT": "3", "INTERCEPTOR_PROBE_PORT": "3"},
        annotations={"interceptor.io/tunnel-port": "4", "interceptor.io/probe-port": "4"},
        flags={"probe_port": ["5"]},
    )

    ports = ("dns_port", "outbound_port", "inbound_port", "tunnel_port", "probe_port")
    assert [getattr(found.config, name) for name in ports] == [1, 2, 3, 4, 5]
    assert [found.origin[name] for name in (*ports, "udp")] == [
        f"file {first}",
        f"file {second}",
        "environment INTERCEPTOR_INBOUND_PORT",
        "annotation interceptor.io/tunnel-port",
        "flag --probe-port",
        "default",
    ]


def test_repeated_list_flag_is_joined_and_other_flags_last_one_wins() -> None:
    found = resolved(flags={"exclude_uids": ["1", "3,5"], "outbound_port": ["1", "2"]}).config

    assert found.exclude_uids == (IdRange(1, 1), IdRange(3, 3), IdRange(5, 5))
    assert found.outbound_port == 2


def test_every_problem_of_every_source_is_reported_at_once_with_its_place(write: Write) -> None:
    path = write("c.yaml", "# first line\nproxy_uids: 3\ndns-port: 70000\n")

    found = refused(
        files=[path],
        environment={"INTERCEPTOR_OUTBUND_PORT": "1", "INTERCEPTOR_INBOUND_PORT": "0"},
        annotations={"interceptor.io/dns": "yes"},
        flags={"exclude_outbound_ports": ["80,foo"]},
    )

    assert found == [
        f"{path}:2: proxy_uids: '3': no such option; did you mean proxy_uid?",
        "INTERCEPTOR_OUTBUND_PORT: '1': no such option; did you mean INTERCEPTOR_OUTBOUND_PORT?",
        f"{path}:3: dns-port: '70000': '70000' is no port: a number from 1 to 65535",
        "INTERCEPTOR_INBOUND_PORT: '0': '0' is no port: a number from 1 to 65535",
        "interceptor.io/dns: 'yes': one of off, resolv-conf, all",
        "--exclude-outbound-ports: '80,foo': 'foo' is no port: a number from 1 to 65535",
    ]


def test_contradiction_names_the_option_as_the_user_wrote_it() -> None:
    assert refused(environment={"INTERCEPTOR_DNS_PORT": "15001"}) == [
        "INTERCEPTOR_DNS_PORT: '15001': is --outbound-port too; the proxy's ports must differ"
    ]


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [
        ("outbound_port", "0", "'0' is no port: a number from 1 to 65535"),
        ("outbound_port", "70000", "'70000' is no port: a number from 1 to 65535"),
        ("outbound_port", "foo", "'foo' is no port: a number from 1 to 65535"),
        ("include_inbound_ports", "90-80", "the range '90-80' runs backwards; write 80-90"),
        ("proxy_uid", "no_such_user", "no user or group is named 'no_such_user' here; give its number"),
        ("proxy_gid", "no-such-group", "no user or group is named 'no-such-group' here; give its number"),
        ("log_rules", "yes", "true or false"),
        ("proxy_mark", "foo", "a mark is VALUE or VALUE/MASK, decimal or 0x…"),
    ],
)
def test_bad_value_is_told_with_option_value_and_what_is_right(flag: str, text: str, expected: str) -> None:
    assert refused(flags={flag: [text]}) == [f"{FIELD[flag].flag}: {text!r}: {expected}"]


@pytest.mark.parametrize("row", FIELDS, ids=lambda row: row.name)
@given(text=malformed_texts)
def test_malformed_value_gives_a_config_error_that_names_it_and_nothing_else(row: Field, text: str) -> None:
    problems = problems_of(flags={row.name: [text]})

    assert {(problem.option, bool(problem.expected)) for problem in problems} <= {(row.flag, True)}


@given(st.text() | st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape")))
def test_any_file_gives_a_config_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("config") / "any"
    path.write_bytes(text.encode("utf-8", "surrogatepass" if "\ud800" <= max(text, default="") <= "\udfff" else "replace"))

    assert all(str(path) in f"{problem.option} {problem.value}" for problem in problems_of(files=[str(path)]))


def test_yaml_words_mean_what_was_written(write: Write) -> None:
    found = resolved(
        files=[write("c.yaml", "inbound: off\ntproxy_mark: 0x539/0xfff\nlog_rules: true\nexclude_uids: [1, 4-9]\n")]
    )

    assert (found.config.inbound, found.config.tproxy_mark, found.config.log_rules) == ("off", Mark(0x539, 0xFFF), True)
    assert found.config.exclude_uids == (IdRange(1, 1), IdRange(4, 9))


def test_json_numbers_booleans_and_lists_are_taken(write: Write) -> None:
    found = resolved(files=[write("c.json", '{"exclude_uids": [1, "4-9"], "log_rules": true, "outbound_port": 1}')]).config

    assert (found.exclude_uids, found.log_rules, found.outbound_port) == ((IdRange(1, 1), IdRange(4, 9)), True, 1)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        pytest.param("c.yaml", "dns: [off]", "takes one value; leave the key out", id="list for one value"),
        pytest.param("c.yaml", "exclude_uids: {a: 1}", "takes one value, or a list", id="mapping"),
        pytest.param("c.yaml", "exclude_uids: [[1]]", "takes one value, or a list", id="nested list"),
        pytest.param("c.json", '{"exclude_uids": null}', "takes one value, or a list", id="null"),
        pytest.param("c.yaml", "dns: all\ndns: off", "stands at", id="key twice"),
        pytest.param("c.json", '{"proxy_uid": 1, "proxy-uid": 2}', "stands at", id="key twice in two spellings"),
        pytest.param("c.yaml", "exclude_uids:", "leave the key out", id="empty value"),
        pytest.param("c.yaml", "udp:  # off", "leave the key out", id="empty value and a comment"),
        pytest.param("c.yaml", "exclude_uids: [1, ~]", "takes one value, or a list", id="null in a list"),
        pytest.param("c.yaml", "exclude_uids: &a [*a]", "takes one value, or a list", id="list in itself"),
        pytest.param("c.yaml", "dns: all # " + "x" * (1 << 20), "not a file of options", id="large"),
        pytest.param("c.yaml", "- dns", "a YAML mapping is wanted", id="list"),
        pytest.param("c.json", "[]", "a JSON object is wanted", id="JSON list"),
        pytest.param("c.yaml", "a: b: c", "not YAML", id="no YAML"),
        pytest.param("c.json", "{", "--config", id="no JSON"),
        pytest.param("c.json", "[" * 100000, "--config", id="deep JSON"),
        pytest.param("c.yaml", "dns: all\n---\ndns: off", "single document", id="two documents"),
    ],
)
def test_bad_file_is_refused_with_its_place(write: Write, name: str, text: str, expected: str) -> None:
    path = write(name, text)

    found = refused(files=[path])

    assert len(found) == 1
    assert expected in found[0]
    assert path in found[0]


def test_endless_file_is_refused() -> None:
    assert refused(files=["/dev/zero"]) == ["--config: '/dev/zero': larger than 1048576 bytes: not a file of options"]


def test_what_a_file_says_cannot_write_to_the_terminal(write: Write) -> None:
    (told,) = refused(files=[write("c.yaml", '"a\\e[2Jb\\nc": 1')])

    assert told.isprintable()


def test_empty_list_clears_what_an_earlier_file_gave(write: Write) -> None:
    files = [write("a.yaml", "exclude_uids: 3"), write("b.yaml", "exclude_uids: []")]

    assert resolved(files=files).config.exclude_uids == ()


# Contradictions: what is given, and the option and the words of each problem that must be told.
CONTRADICTIONS: dict[str, tuple[dict[str, str], set[tuple[str, str]]]] = {
    "ports": ({"outbound_port": "7", "inbound_port": "7"}, {("inbound_port", "must differ")}),
    "default port": ({"probe_port": "15053"}, {("probe_port", "must differ")}),
    "family": (
        {"ip_family": "v4", "exclude_outbound_cidrs": "fd00::/8", "exclude_inbound_cidrs": "10.0.0.0/8,fd00::/8"},
        {("exclude_outbound_cidrs", "--ip-family v4"), ("exclude_inbound_cidrs", "--ip-family v4")},
    ),
    "no identity": ({"proxy_uid": "", "proxy_gid": ""}, {("proxy_uid", "needs an identity")}),
    "cgroup": ({"proxy_cgroup": "a/b", "backend": "libiptc"}, {("proxy_cgroup", "only the nft backend")}),
    "narrow mark": ({"tproxy_mark": "1/1"}, {("tproxy_mark", "no room")}),
    "like marks": ({"proxy_mark": "5", "tproxy_mark": "5/0xff"}, {("proxy_mark", "can't be told from")}),
    "interfaces": (
        {"virtual_interfaces": "lo,a", "exclude_interfaces": "a"},
        {("virtual_interfaces", "the loopback interface"), ("virtual_interfaces", "is in --exclude-interfaces too")},
    ),
}
# For each option a value that is none.
BAD = {row.name: "\x00" for row in FIELDS}
# Which may be mixed: a contradiction's options must be its own, and at least one identity is left where it is not the matter.
_TAKEN = {name: set(options) for name, (options, _) in CONTRADICTIONS.items()} | {
    "no identity": {"proxy_uid", "proxy_gid", "proxy_mark", "proxy_cgroup"},
    "default port": {"probe_port", "dns_port"},
}


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """Options that contradict each other, mixed with bad values of other options; and what must be told of them."""
    given: dict[str, str] = {}
    expected: set[tuple[str, str]] = set()
    taken: set[str] = set()
    for name in draw(st.lists(st.sampled_from(sorted(CONTRADICTIONS)), unique=True)):
        if not taken & _TAKEN[name]:
            taken |= _TAKEN[name]
            given |= CONTRADICTIONS[name][0]
            expected |= CONTRADICTIONS[name][1]
    for name in draw(st.lists(st.sampled_from(sorted(BAD)), unique=True)):
        if name not in taken:
            given[name] = BAD[name]
            expected.add((name, ""))
    return given, expected


@given(mixtures(), st.randoms(use_true_random=False))
def test_bad_values_and_contradictions_are_told_together_from_any_source(
    mixture: tuple[dict[str, str], set[tuple[str, str]]], random: Any
) -> None:
    options, expected = mixture
    given: dict[str, dict[str, Any]] = {"environment": {}, "annotations": {}, "flags": {}}
    places = {}
    for name, text in options.items():
        row = FIELD[name]
        source, key, value = random.choice(
            (("environment", row.env, text), ("annotations", row.annotation, text), ("flags", name, [text]))
        )
        given[source][key] = value
        places[row.flag if source == "flags" else key] = name

    problems = problems_of(**given)

    told = [(places[problem.option], problem.expected) for problem in problems]
    assert len(told) == len(expected)
    assert all(any(option == name and words in text for name, text in told) for option, words in expected)


@given(st.dictionaries(st.sampled_from([row.name for row in FIELDS]), malformed_texts, max_size=8), mixtures())
def test_what_is_told_of_good_values_stays_told_whatever_else_is_bad(
    more: dict[str, str], mixture: tuple[dict[str, str], set[tuple[str, str]]]
) -> None:
    options = {name: [text] for name, text in mixture[0].items()}
    extra = {name: [text] for name, text in more.items() if name not in options}
    alone = {problem for problem in problems_of(flags=options) if problem.option[2:].replace("-", "_") in options}
    # With other values of options that decide, something else may be true of them.
    deciding = {"ip_family", "backend", "proxy_mark", "proxy_cgroup", "proxy_gid", "tproxy_mark", "exclude_interfaces"}
    extra = {name: texts for name, texts in extra.items() if name not in deciding and not name.endswith("_port")}

    assert alone <= set(problems_of(flags=options | extra))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("c.yaml", "a: b: c", id="unreadable file"),
        pytest.param("c.yaml", "outbound_port: [2]", id="no value"),
        pytest.param("c.yaml", "outbond_port: 2", id="misspelt"),
        pytest.param("c.yaml", "outbound_port: 70000", id="bad value"),
    ],
)
def test_no_contradiction_is_told_of_a_value_that_is_not_known(write: Write, name: str, text: str) -> None:
    # The default of outbound_port is 15001 too, but the file meant another.
    assert len(refused(files=[write(name, text)], flags={"dns_port": ["15001"]})) == 1


def test_contradiction_beside_an_unreadable_file_is_told_when_all_of_it_is_known() -> None:
    told = refused(files=["/no/such/file"], flags={"dns_port": ["1"], "probe_port": ["1"]})

    assert [text.partition(":")[0] for text in told] == ["--config", "--probe-port"]


def test_missing_file_is_a_config_error() -> None:
    assert refused(files=["/no/such/file"]) == ["--config: '/no/such/file': No such file or directory"]


def test_empty_file_says_nothing(write: Write) -> None:
    assert resolved(files=[write("c.yaml", "# nothing\n")]).config == Config()


def test_json_without_suffix_is_known_by_its_brace_and_yaml_flow_too(write: Write) -> None:
    assert resolved(files=[write("a", '\n {"udp": "tproxy"}')]).config.udp == "tproxy"
    assert resolved(files=[write("b", "{udp: tproxy}")]).config.udp == "tproxy"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INTERCEPTOR_SERVICE_HOST", "10.0.0.1"),
        ("INTERCEPTOR_SERVICE_PORT_HTTP", "80"),
        ("INTERCEPTOR_PORT", "tcp://10.0.0.1:80"),
        ("INTERCEPTOR_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("INTERCEPTOR_OUTBOUND_PORT", "tcp://10.0.0.1:80"),
        ("INTERCEPTOR_PROXY_SERVICE_PORT", "80"),
    ],
)
def test_variable_that_kubernetes_sets_for_a_service_is_ignored(name: str, value: str) -> None:
    layer = from_environment({name: value})

    assert (layer.values, layer.problems) == ({}, [])


def test_annotations_of_others_are_ignored() -> None:
    assert resolved(annotations={"sidecar.istio.io/inject": "true"}).config == Config()


def test_unknown_annotation_of_ours_is_refused() -> None:
    assert "did you mean interceptor.io/udp?" in refused(annotations={"interceptor.io/udpp": "off"})[0]


def test_names_are_looked_up_in_the_files_of_this_root(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("app:x:1000:100::/:/bin/sh\n+::::::\nbroken\napp:x:1:1:::\nbad:x:nan:1:::\n")
    (tmp_path / "etc/group").write_text("web:x:100:app\n")
    names = local_names(str(tmp_path))

    assert (names.uid("app"), names.gid("web")) == (1000, 100)
    for name in ("broken", "bad", "web", "+"):
        with pytest.raises(KeyError):
            names.uid(name)


def test_without_a_passwd_file_every_name_is_unknown(tmp_path: Path) -> None:
    assert refused(flags={"proxy_uid": ["root"]}, names=local_names(str(tmp_path))) == [
        "--proxy-uid: 'root': no user or group is named 'root' here; give its number"
    ]
