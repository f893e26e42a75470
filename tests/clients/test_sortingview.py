"""sortingview 0.14.2, unmodified: a figure of generated spikes is stored, and every object of it loads back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.clients.zone_client import Lab, ZoneClient, running_lab

FIGURE = """
import numpy as np
import sortingview.views as vv

rng = np.random.default_rng(1)
spikes = {unit: np.sort(rng.uniform(0, 60, 400 + 50 * unit)).astype(np.float32) for unit in range(1, 9)}
raster = vv.RasterPlot(
    start_time_sec=0,
    end_time_sec=60,
    plots=[vv.RasterPlotItem(unit_id=unit, spike_times_sec=times) for unit, times in spikes.items()],
)
table = vv.UnitsTable(
    columns=[
        vv.UnitsTableColumn(key='unitId', label='Unit', dtype='int'),
        vv.UnitsTableColumn(key='rate', label='Rate (Hz)', dtype='float'),
    ],
    rows=[
        vv.UnitsTableRow(unit_id=unit, values={'unitId': unit, 'rate': len(times) / 60})
        for unit, times in spikes.items()
    ],
)
figure = vv.Box(
    direction='horizontal',
    items=[vv.LayoutItem(table, max_size=200), vv.LayoutItem(raster)],
)
answer(figure.url(label='Generated spikes'))
"""
READ = """
import base64, zlib
import numpy as np

layout = ka.load_json(%r)
views = {view['type']: ka.load_json(view['dataUri']) for view in layout['views']}
rng = np.random.default_rng(1)
equal = []
for plot in views['RasterPlot']['plots']:
    stored = plot['spikeTimesSec']
    raw = zlib.decompress(base64.b64decode(stored['data_gzip_b64'])) if 'data_gzip_b64' in stored else None
    times = np.frombuffer(base64.b64decode(stored['data_b64']) if raw is None else raw, dtype=stored['dtype'])
    made = np.sort(rng.uniform(0, 60, 400 + 50 * plot['unitId'])).astype(np.float32)
    equal.append(bool((times == made).all()))
answer({'equal': equal, 'table': views['UnitsTable'], 'texts': len({json.dumps(one) for one in views.values()})})
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(tmp_path_factory.mktemp("sortingview")) as lab:
        lab.zone("sorting", ann=["provideFiles", "requestFiles"], ben=["requestFiles"])
        yield lab


def test_a_figure(lab: Lab, tmp_path: Path) -> None:
    ann = ZoneClient(lab, tmp_path / "ann", "sorting", lab.key("ann"), "sortingview")
    ben = ZoneClient(lab, tmp_path / "ben", "sorting", lab.key("ben"))
    before = lab.log_size()
    url = urlsplit(ann.run(FIGURE))
    query = parse_qs(url.query)
    assert query["zone"] == ["sorting"]
    (data,) = query["d"]
    assert data.startswith("kachery:sorting:sha1:")
    stored = lab.requests(before).count(("POST", "/api/finalizeFileUpload", 200))
    before = lab.log_size()
    found = ben.run(READ % data)
    assert found["equal"] == [True] * 8
    assert [row["unitId"] for row in found["table"]["rows"]] == list(range(1, 9))
    # Everything that was stored was read: the layout and the data of both views.
    assert stored == found["texts"] + 1 == 3
    assert lab.requests(before).count(("GET", "/sha1/", 200)) == stored
    eve = ZoneClient(lab, tmp_path / "eve", "sorting", lab.key("eve"))
    assert "(403)" in eve.fails(READ % data)
