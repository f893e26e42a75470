def test_one(node):
    assert node.store(b"abc").json()["sha1"] == "a9993e364706816aba3e25717850c26c9cd0d89d"
    assert node.terminate() == 0
