"""Tables in and out: windows of Parquet rows read with bounded memory, resumable atomic output."""
