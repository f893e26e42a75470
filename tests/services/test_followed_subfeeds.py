"""What is wrong with a followed feed: what is over by itself, and what stays."""

from __future__ import annotations

from typing import cast

import pytest

from kachery_lab.core.ids import FeedId, SubfeedHash
from kachery_lab.services import followed_subfeeds
from kachery_lab.services.channel_subfeeds import ChannelSubfeed
from kachery_lab.services.feed_channels import FeedChannels
from kachery_lab.services.followed_subfeeds import FollowedSubfeed

AT_ONCE, MUCH_LATER = -1.0, 1e9


@pytest.fixture
def followed() -> FollowedSubfeed:
    side = cast("FeedChannels", object())
    subfeed = ChannelSubfeed(side, "recordings", FeedId("ab" * 32), SubfeedHash("cd" * 20))
    return FollowedSubfeed(subfeed, "origin", used=0.0)


def test_what_is_vouched_for_has_to_come(followed: FollowedSubfeed) -> None:
    assert followed.held_back(0, AT_ONCE) is None
    followed.note_vouched(5, have=2)
    assert followed.held_back(2, MUCH_LATER) is None, "there is time left"
    problem = followed.held_back(2, AT_ONCE)
    assert problem is not None
    assert "5 messages" in problem
    assert "gives 2" in problem
    assert followed.held_back(5, AT_ONCE) is None


def test_less_than_is_known_says_nothing_new(followed: FollowedSubfeed) -> None:
    followed.note_vouched(3, have=3)
    assert followed.vouched == 0
    followed.note_vouched(5, have=3)
    since = followed.vouched_at
    followed.note_vouched(4, have=3)
    followed.note_vouched(5, have=3)
    assert (followed.vouched, followed.vouched_at) == (5, since)


def test_messages_that_come_settle_that_they_were_missing(followed: FollowedSubfeed) -> None:
    followed.note_vouched(5, have=2)
    followed.report("the rest has not come", held_back=True)
    followed.settle(4)
    assert (followed.told, followed.vouched) == ("the rest has not come", 5)
    followed.settle(5)
    assert (followed.told, followed.vouched) == (None, 0)


@pytest.mark.parametrize("text", ["a fork", "what the feed's key vouches for comes too late"])
def test_what_was_refused_stays_refused(followed: FollowedSubfeed, text: str) -> None:
    followed.note_vouched(5, have=2)
    followed.report(text, held_back=False)
    followed.settle(5)
    assert (followed.told, followed.vouched) == (text, 0)


def test_the_latest_counts_and_not_for_ever(followed: FollowedSubfeed, monkeypatch: pytest.MonkeyPatch) -> None:
    followed.report("a fork", held_back=False)
    followed.report("the rest has not come", held_back=True)
    assert followed.told == "the rest has not come"
    monkeypatch.setattr(followed_subfeeds, "PROBLEM_SECONDS", 0.0)
    assert followed.told is None
