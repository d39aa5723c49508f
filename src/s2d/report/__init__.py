"""The report: one HTML page, which opens offline from disk, made from the plain JSON of audits and runs.

Nothing here imports torch or another room; a page can be written wherever the JSON can be read.

    from s2d.report import write_report
    write_report(json.load(open("results.json")), "report.html")

Input (further keys are allowed and ignored):

* An **audit**: ``{"kind": "audit", "model": str, "run": {…}, "records": [row, …]}``, a row having ``weight`` and any of
  ``role``, ``depth``, ``shape``, ``sigma`` ``[s1, s2, s3]``, ``sigma_over_median``, ``stable_rank``, ``pcdr``
  ``[p1, p2, p3]``, ``pcdr_data``, ``output_max``, ``output_ratio`` (max / RMS), ``input_max``, ``input_ratio``,
  ``selected``, ``selected_by`` ("weight" | "data"), ``w4a4_error``, and ``histogram``: ``{"edges": [n + 1],
  "counts": [n], "grid": [the quantizer's levels], "of": "input" | "output"}``
  (bins may differ in width: fine in the middle and coarse in the tails shows most), and ``spectrum``:
  ``{"rank": [1, 2, …], "sigma": […]}``, all singular values as a curve.
* A **run**: ``{"run": {…}, "records": [{"task", "model", "conditioning", "seed", "spec", "method", "metric", "value",
  "higher_is_better", …}]}``, optionally with ``"audits": {"adamw": audit, "s2d": audit}`` and ``"history"``: a list of
  ``{"step", "weight", "sigma": […], "output_ratio", "pcdr": […], "selected"}``, one per refresh and weight.
  ``"trial": true`` in its ``run`` part marks a run whose numbers mean nothing.
* A **trend**: ``{"kind": "trend", "run": {…}, "records": […], "audits": {label: audit, …}}``, the audits in the order
  of the training; records whose ``conditioning`` is a label are that checkpoint's scores.
"""

from s2d.report.card import held_back, write_card
from s2d.report.page import render_report, write_report

__all__ = ["held_back", "render_report", "write_card", "write_report"]
