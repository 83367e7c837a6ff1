"""Test the page of the server: who gets it, and that its requests are let in."""

import re
import shutil
import subprocess

import httpx
import pytest
from server_in_thread import serve

from flashmoe.engine import Engine


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    # Nothing is asked of the engine, so it loads no model.
    with Engine(tmp_path_factory.mktemp("none")) as engine, serve(engine, key="s3cret") as server:
        yield server.url.removesuffix("/v1")


def get(url, path="/v1/models", **headers):
    return httpx.get(url + path, headers=headers, timeout=60)


def test_page_needs_no_key_and_its_requests_do(url):
    page = get(url, "/")
    assert (page.status_code, page.headers["content-type"][:9]) == (200, "text/html")
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert "s3cret" not in page.text
    key = {"Authorization": "Bearer s3cret"}
    assert get(url, Origin=url, **key).status_code == 200
    assert get(url, Origin=url).status_code == 401


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://127.0.0.1:1", "null", "http://[", "://", ""]
)
def test_other_pages_are_kept_out(url, origin):
    key = {"Authorization": "Bearer s3cret"}
    assert get(url, Origin=origin, **key).status_code == 403


def test_page_of_a_name_that_points_here_is_kept_out(tmp_path):
    with Engine(tmp_path) as engine, serve(engine) as server:
        url = server.url.removesuffix("/v1")
        port = url.rpartition(":")[2]
        own = {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"}
        assert get(url, "/", **own).status_code == 403
        assert get(url, "/", Origin=url).status_code == 200


def test_script_of_the_page_finds_what_it_looks_for(url, tmp_path):
    page = get(url, "/").text
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    looked_for = set(re.findall(r'\$\("(\w+)"\)', script))
    assert looked_for <= set(re.findall(r'id="(\w+)"', page))
    # Texts of models are never taken for HTML.
    assert "innerHTML" not in script
    if (node := shutil.which("node")) is not None:
        file = tmp_path / "page.js"
        file.write_text(script)
        subprocess.run([node, "--check", file], check=True, timeout=60)
