"""The audit: where a model's outliers come from, weight by weight, and what low bits cost there.

    audit = s2d.audit(model, batches)
    audit.worst(10); audit.table(); audit.save("audit.html")

`measure` measures a model, `findings` holds the results, `example_inputs` makes inputs when none are given.
"""

from s2d.audit.example_inputs import audit_batches, random_batch
from s2d.audit.findings import Audit, AuditRow, Trend
from s2d.audit.measure import audit, audit_many

__all__ = ["Audit", "AuditRow", "Trend", "audit", "audit_batches", "audit_many", "random_batch"]
