"""What is shown of pip's output."""

from tools.installing import EVERY, milestones


def test_a_long_installation_is_a_handful_of_lines():
    lines = [f"Collecting package{number}\n  Using cached x\n" for number in range(2 * EVERY)]
    lines = [line + "\n" for text in lines for line in text.splitlines()]
    lines += ["  Downloading https://x/torch-2.whl (800.1 MB)\n", "  Downloading y.whl (2.0 MB)\n"]
    lines += ["Installing collected packages: a, b\n", "Successfully installed a-1 b-2\n"]
    assert list(milestones(lines)) == [
        f"  {EVERY} packages found",
        f"  {2 * EVERY} packages found",
        "  downloading torch-2.whl (800.1 MB)",
        "  unpacking 2",
        "  installed 2",
    ]


def test_an_error_is_shown_whole():
    lines = ["WARNING: noise\n", "ERROR: no matching distribution\n", "details\n"]
    assert list(milestones(lines)) == ["ERROR: no matching distribution", "details"]
