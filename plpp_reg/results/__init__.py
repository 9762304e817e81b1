"""What folders of runs hold, as records, tables and reports."""
