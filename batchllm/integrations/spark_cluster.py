"""A Spark cluster, as its driver sees it."""

from collections import Counter

import numpy as np
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from batchllm.prefix.partition import Ints

_TRIES = 64  # integers looked at for each partition, to find one that hashes to it


def num_tasks(session: SparkSession) -> int:
    """How many tasks the cluster runs side by side, as far as it is known by now."""
    context = session.sparkContext
    return max(context.defaultParallelism // int(context.getConf().get("spark.task.cpus", "1")), 1)


def tasks_on_a_host(session: SparkSession, workers: int) -> int:
    """How many tasks run side by side on the host that has most executors."""
    context = session.sparkContext
    executors = context._jsc.sc().statusTracker().getExecutorInfos()
    hosts = Counter(executor.host() for executor in executors)
    if len(executors) < 2:
        return workers  # the driver alone, or a cluster that has not begun
    driver = context.getConf().get("spark.driver.host", "")
    if hosts[driver] > 0:
        hosts[driver] -= 1
    each = -(-workers // (len(executors) - 1))
    return max(hosts.values()) * each


def labels_of(session: SparkSession, count: int) -> Ints:
    """For each of so many partitions an integer that Spark's hash partitioning brings to it.

    Spark has no public way to say to which partition a row goes but this in all its versions.
    """
    target = F.pmod(F.hash(F.col("id")), F.lit(count)).alias("target")
    rows = session.range(0, count * _TRIES, 1, 1).groupBy(target).agg(F.min("id").alias("id"))
    labels = np.full(count, -1, dtype=np.int64)
    for row in rows.collect():
        labels[row.target] = row.id
    assert (labels >= 0).all(), count
    return labels
