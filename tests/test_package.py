"""The package: what is installed is all that the service needs."""

import json
import shutil
import subprocess
import sys
import sysconfig
from urllib.request import urlopen

import pytest

from conftest import HERE, free_port, wait_until

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "bookkeep.py", "replay.py")


@pytest.fixture
def installed(tmp_path):
    """The folder of commands of an environment that has the wheel, and what it depends on."""

    def run(*command):
        subprocess.run([sys.executable, "-m", *map(str, command)], check=True, timeout=60)

    source, environment = tmp_path / "source", tmp_path / "environment"
    ignored = shutil.ignore_patterns("__pycache__")  # built from a copy: it leaves files beside it
    shutil.copytree(HERE / "bookkeep_extra", source / "bookkeep_extra", ignore=ignored)
    for name in SOURCES:
        shutil.copy(HERE / name, source)
    run("pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    [wheel] = tmp_path.glob("bookkeep_service-*.whl")
    run("venv", "--without-pip", environment)
    there = ("--python", environment / "bin" / "python")
    run("pip", "-q", *there, "install", "--no-deps", "--no-index", "--no-compile", wheel)
    [packages] = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    shutil.rmtree(source)
    return environment / "bin"


def test_what_is_installed_serves_its_page_and_its_description(installed, tmp_path):
    port, elsewhere = free_port(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [installed / "bookkeep", f"--port={port}", f"--log={elsewhere / 'log.jsonl'}"]

    def get(path):
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.headers.get_content_type(), answer.read()

    def answers():
        try:
            return get("/health")
        except OSError:
            assert process.poll() is None
            return None

    with subprocess.Popen(command, cwd=elsewhere) as process:
        try:
            wait_until(answers)
            media, page = get("/")
            assert media == "text/html"
            assert b"desk.js" in page
            for path in ("desk.js", "desk.css"):
                assert get(f"/{path}")[1] == (HERE / "bookkeep_extra" / "page" / path).read_bytes()
            assert "/predict" in json.loads(get("/openapi.json")[1])["paths"]
            assert b"bookkeep_bookings 0" in get("/metrics")[1]
        finally:
            process.terminate()
    assert process.returncode == 0
    log = str(elsewhere / "log.jsonl")
    assert b"no problems" in subprocess.check_output([command[0], "check", log], cwd=elsewhere)
    said = subprocess.check_output([installed / "bookkeep-replay", "--help"], cwd=elsewhere)
    assert said.startswith(b"usage: replay")
