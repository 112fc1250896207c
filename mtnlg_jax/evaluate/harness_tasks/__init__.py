"""Tasks of lm-evaluation-harness on local rows, without a network.

The YAML files here take the place of the harness's own of the same name: the same prompts and
metrics (Smith et al. 2022, section 5, build on the harness), with rows from files on this disk.
`run.run_tasks` runs them; `lm_eval --include_path=...` can as well.
"""
