"""slope export --push uploads real files by huggingface_hub, to a hub on the loopback; its faults are sentences."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.hub import OWNER, TOKEN, Hub, serving_hub
from support.runs import Result, slope, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of huggingface_hub's own requests
]
NAME = f"{OWNER}/small-2.4"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process takes for the real one."""
    with serving_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_whole_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    """By the variables that users set."""
    out = tmp_path / "out"
    with serving_hub() as hub:
        own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        words = [sys.executable, "-m", "slope_cli", "export", str(trained()), str(out), "--push", NAME, "--json"]
        root = str(Path(__file__).parent.parent)
        done = subprocess.run(words, env=os.environ | own, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert json.loads(done.stdout)["pushed"] == f"{hub.address}/{NAME}"
        assert hub.private == {NAME: True}
        kept = hub.files[NAME]
        assert kept.pop(".gitattributes")
        assert kept == on_disk(out)
        assert {"model.safetensors", "adapter/adapter_model.safetensors", "README.md", "tokenizer.json"} <= kept.keys()


def test_a_folder_is_pushed_again_without_what_is_not_the_model(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert slope("export", trained(), out).code == 0
    written = on_disk(out)
    for extra in ("finetune/SFT-1/result.json", ".cache/x"):
        (out / extra).parent.mkdir(parents=True)
        (out / extra).write_text("{}")
    result = slope("export", out, "--push", NAME, "--public")
    assert (result.code, result.out) == (0, f"pushed to {hub.address}/{NAME}, public\n"), result.err
    assert hub.private == {NAME: False}
    hub.files[NAME]["adapter/old.safetensors"] = b"of an earlier export"
    (out / "README.md").write_text("Another.")
    assert slope("export", out, "--push", NAME, "--public").code == 0
    attributes = {".gitattributes": hub.files[NAME][".gitattributes"]}
    assert hub.files[NAME] == written | {"README.md": b"Another."} | attributes


def test_a_packed_export_is_pushed(hub: Hub, tmp_path: Path) -> None:
    result = slope("export", trained(), tmp_path / "out", "--format", "packed", "--push", NAME)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == f"pushed to {hub.address}/{NAME}, private"
    assert "packed.safetensors.index.json" in hub.files[NAME]


# ------------------------------------------------------------------------------------------------ faults in one line


def pushed(folder: Path, *words: str) -> Result:
    return slope("export", folder, "--push", *(words or (NAME,)))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "out"
    assert slope("export", trained(), out).code == 0
    return out


def test_without_a_token_or_with_a_wrong_one(
    hub: Hub, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN")
    result = slope("export", trained(), tmp_path / "new", "--push", NAME)
    assert (result.code, result.err.startswith(f"error: --push {NAME}: no token; log in with `hf auth login`")) == (
        2,
        True,
    )
    assert not (tmp_path / "new").exists()  # nothing is exported in vain
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    result = pushed(export)
    assert result.code == 2
    assert result.err.startswith(f"error: --push {NAME}: the hub does not accept the token; log in")
    assert hub.private == {}


def test_in_a_namespace_of_others(hub: Hub, export: Path) -> None:
    result = pushed(export, "others/small")
    assert result.code == 2
    assert result.err.startswith("error: --push others/small: the token has no right to write there; log in")
    assert result.err.endswith(f"then `slope export {export} --push others/small` uploads it\n")


def test_a_public_repository_gets_nothing_unless_that_is_said(hub: Hub, export: Path) -> None:
    hub.private, hub.files = {NAME: False, f"{OWNER}/own": True}, {NAME: {}, f"{OWNER}/own": {}}
    result = pushed(export)
    assert (result.code, "this repository is public; add --public, or choose another name" in result.err) == (2, True)
    result = pushed(export, f"{OWNER}/own", "--public")
    assert (result.code, "this repository is private; leave out --public" in result.err) == (2, True)
    assert hub.files == {NAME: {}, f"{OWNER}/own": {}}


def test_a_hub_that_fails_or_is_not_there(hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fails = "/commit/"
    result = pushed(export)
    assert result.code == 1
    assert f"--push {NAME}: the hub answered 500: the disk is full; then `slope export" in result.err
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    result = pushed(export)
    assert result.code == 1
    assert result.err == (
        "error: --push: http://127.0.0.1:9 does not answer; check the network, HF_ENDPOINT, HF_HUB_OFFLINE\n"
    )


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["EXPORT"], "OUT is missing: the folder to write"),
        (["EXPORT", "--public"], "--public: is for --push"),
        (["EXPORT", "--push", NAME, "--merge"], "--merge: is for an export; give OUT"),
        (["EXPORT", "--push", NAME, "--format", "packed"], "--format: is for an export; give OUT"),
        (["RUN", "--push", NAME], "{run}: is a run; give OUT, the folder to export it to, too"),
        (["EMPTY", "--push", NAME], "{empty}: is not an exported folder (no config.json)"),
        (["EXPORT", "--push", "small"], "--push small: must be NAMESPACE/NAME"),
        (["EXPORT", "--push", "me/a--b"], "--push me/a--b: must be NAMESPACE/NAME"),
    ],
)
def test_wrong_words(words: list[str], fault: str, export: Path, tmp_path: Path) -> None:
    named = {"EXPORT": export, "RUN": trained(), "EMPTY": tmp_path}
    result = slope("export", *(named.get(word, word) for word in words))
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: " + fault.format(run=trained(), empty=tmp_path))


def test_a_link_out_of_the_folder_is_not_followed(hub: Hub, export: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "notes").symlink_to(tmp_path / "secret")
    result = pushed(tmp_path / "out")
    assert (result.code, "notes: is a link out of" in result.err) == (2, True)
    assert hub.private == {}
