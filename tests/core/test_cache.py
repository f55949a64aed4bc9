"""The cache: bounded by bytes, least recently used first, safe in threads, copies and forks."""

import copy
import os
import pickle
import threading

import pytest

from peft_taskmoe.cache import LRUCache


def length(key, value):
    return len(value)


def test_what_was_used_longest_ago_goes_first_and_bytes_are_counted():
    cache = LRUCache(10, length)
    for key in "abc":
        cache.put(key, key * 3)
    assert cache.get("a") == "aaa"
    cache.put("d", "dd")  # "b" is now the oldest
    assert [cache.get(key) for key in "abcd"] == ["aaa", None, "ccc", "dd"]
    assert (len(cache), cache.nbytes) == (3, 8)
    cache.put("a", "A")  # the new value replaces the old one's weight
    assert (cache.get("a"), cache.nbytes) == ("A", 6)
    cache.put("c", "x" * 11)  # too heavy by itself: the old value must not stay either
    assert cache.get("c") is None and cache.nbytes == 3
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        LRUCache(-1, length)


def test_copies_and_forks_are_empty_and_do_not_wait_for_a_lock():
    cache = LRUCache(10, length)
    cache.put("a", "a")
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert len(other) == 0 and other.max_bytes == 10
        other.put("b", "b")
    with cache._lock:  # as if another thread were inside when the process is forked
        pid = os.fork()
        if pid == 0:
            cache.put("b", "b")
            os._exit(len(cache))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert cache.get("a") == "a" and cache.get("b") is None


def test_many_threads_keep_it_within_its_bound():
    cache = LRUCache(500, length)

    def work(seed):
        for i in range(2000):
            key = (seed * i) % 97
            if cache.get(key) is None:
                cache.put(key, "x" * key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = [cache.get(key) for key in range(97)]
    assert cache.nbytes == sum(len(value) for value in kept if value is not None) <= 500
