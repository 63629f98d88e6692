"""How much each attention head matters: statistics of images, a graph of heads, and the Markov chain on it."""

from gohsp.core.ranking.graph import StationaryDistribution, stationary_distribution, transition_matrix
from gohsp.core.ranking.ranking import HeadRanking, RankingSettings, rank, rank_by
from gohsp.core.ranking.statistics import HeadStatistics, HeadStatisticsFitter
from gohsp.core.ranking.stepwise import count_rankings, rank_in_steps

__all__ = [
    "HeadRanking",
    "HeadStatistics",
    "HeadStatisticsFitter",
    "RankingSettings",
    "StationaryDistribution",
    "count_rankings",
    "rank",
    "rank_by",
    "rank_in_steps",
    "stationary_distribution",
    "transition_matrix",
]
