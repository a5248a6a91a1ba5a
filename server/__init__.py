"""The coordinator's side: asks sites, unifies their answers, trains and judges the student. Never imports client."""
