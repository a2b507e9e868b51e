"""The matrix of a chain of tasks on its page: numbers, picture, what changed sides."""

from test_report import Page

from framework.track.chain import figures

CHAIN = {
    "stages": ["start", "a<b>", "b"],
    "tasks": {
        "first": {
            "learnt": "a<b>", "measure": "accuracy", "scores": [0.1, 0.875, 0.5], "chance": 0.25, "rows": 8,
            "intervals": [[0.0, 0.3], [0.6, 1.0], [0.2, 0.8]], "forgetting": 0.375,
            "flips": {"start": {"lost": 0.0, "gained": 0.4}, "a<b>": {"lost": 0.4, "gained": 0.025}},
        },
        "second": {
            "learnt": "b", "measure": "likelihood", "scores": [0.2, 0.3, 0.9], "losses": [1.6, 1.2, 0.1],
            "forgetting": None, "rows": 5,
        },
    },
    "means": {
        "accuracy": {
            "accuracy": 0.5, "learning_accuracy": 0.875, "backward_transfer": -0.375, "forgetting": 0.375,
        },
        "likelihood": {
            "accuracy": 0.9, "learning_accuracy": 0.9, "backward_transfer": None, "forgetting": None,
        },
    },
}  # fmt: skip


def test_every_task_after_every_stage_in_numbers_and_in_one_picture():
    html = figures(CHAIN)
    page = Page(f"<body>{html}</body>")
    for expected in (
        "at the end of accuracy 50.0% mean over the tasks (ACC)",
        "since learnt of accuracy -37.5 points mean change from then to the end (BWT)",
        "forgotten of accuracy +37.5 points",
        "at the end of likelihood 90.0%",
        "task start a<b> b forgetting changed sides",
        "first accuracy of 8 rows 10.0% [0.0%, 30.0%] 87.5% [60.0%, 100.0%] 50.0% [20.0%, 80.0%]",
        "[20.0%, 80.0%] +37.5 points",
        "since a<b>: 40.0% lost, 2.5% gained",
        "second likelihood of 5 rows 20.0% 30.0% 90.0%",
        "0 start, 1 a<b>, 2 b",
    ):
        assert expected in page.text, expected
    assert "since learnt of likelihood" not in page.text  # nothing came after it
    assert page.tags.count("svg") == 1
    assert "first, stage 2: 0.5" in html
    assert "<b>87.5%</b>" in html  # after its own stage
    assert "a<b>" not in html  # escaped
    assert figures({**CHAIN, "tasks": {}}) == ""
