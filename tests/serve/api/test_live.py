"""The API with the real engine."""


def test_metrics_show_the_engine(live):
    status, _, text = live.ask("GET", "/metrics")
    page = text.decode()
    assert status == 200
    assert 'mtnlg_engine_slots{model="tiny"} 4.0' in page
    assert 'mtnlg_engine_turns_total{model="tiny"}' in page
    assert 'mtnlg_engine_first_token_seconds_bucket{le="+Inf",model="tiny"}' in page
    assert 'mtnlg_engine_compiles_serving_total{model="tiny"}' in page
