"""What has to be atomic in Redis, in Lua; effects are replicated, time is the server's.

They are sent with EVAL: the server compiles a text once and knows it again by its digest, while
EVALSHA would need a second round trip after every restart or SCRIPT FLUSH. Numbers above 2**46 go
through `%.0f`, because Lua would write them with 14 digits.
"""

from __future__ import annotations

# KEYS lease, index   ARGV key, value, ttl in ms
# The index outlives its longest lease and no longer.
PUT_LEASE = """
local time = redis.call('TIME')
local ttl = tonumber(ARGV[3])
local expires = time[1] * 1000 + math.floor(time[2] / 1000) + ttl
redis.call('SET', KEYS[1], ARGV[2], 'PX', ttl)
redis.call('ZADD', KEYS[2], string.format('%.0f', expires), ARGV[1])
if redis.call('PTTL', KEYS[2]) < ttl then redis.call('PEXPIRE', KEYS[2], ttl) end
"""

# KEYS index   ARGV prefix of leases   ->   {key, value, key, value, ...}
LIST_LEASES = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now))
local found = {}
for _, key in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local value = redis.call('GET', ARGV[1] .. key)
  if value then
    found[#found + 1] = key
    found[#found + 1] = value
  end
end
return found
"""

# A score that is above all others, even within one microsecond.
_NEXT_SCORE = """
local time = redis.call('TIME')
local newest = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')
local score = math.max(time[1] * 1000000 + time[2], (tonumber(newest[2]) or 0) + 1)
local function next_score()
  score = score + 1
  return string.format('%.0f', score)
end
"""

# KEYS lru, cost   ARGV prefix of blocks, budget, ttl in ms, then (hash, cost) of each block
# Takes the batch's old versions off the account, evicts until the new ones fit, then counts them.
# Where Redis itself evicted one of the two indexes, all that the other one knows is dropped.
MAKE_ROOM = (
    _NEXT_SCORE
    + """
local function drop(hashes)
  for _, hash in ipairs(hashes) do
    if hash ~= '' then redis.call('UNLINK', ARGV[1] .. hash) end
  end
end
local num_counted = redis.call('HLEN', KEYS[2]) - redis.call('HEXISTS', KEYS[2], '')
if num_counted ~= redis.call('ZCARD', KEYS[1]) then
  drop(redis.call('HKEYS', KEYS[2]))
  drop(redis.call('ZRANGE', KEYS[1], 0, -1))
  redis.call('DEL', KEYS[1], KEYS[2])
end
local used = tonumber(redis.call('HGET', KEYS[2], '')) or 0
local function forget(hash)
  used = used - (tonumber(redis.call('HGET', KEYS[2], hash)) or 0)
  redis.call('HDEL', KEYS[2], hash)
end
local added = 0
for i = 4, #ARGV, 2 do
  forget(ARGV[i])
  redis.call('ZREM', KEYS[1], ARGV[i])
  added = added + ARGV[i + 1]
end
while used + added > tonumber(ARGV[2]) do
  local oldest = redis.call('ZPOPMIN', KEYS[1])[1]
  forget(oldest)
  drop({oldest})
end
for i = 4, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], next_score(), ARGV[i])
  redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
end
redis.call('HSET', KEYS[2], '', string.format('%.0f', used + added))
for i = 1, 2 do redis.call('PEXPIRE', KEYS[i], ARGV[3]) end
"""
)

# KEYS lru, cost   ARGV prefix of blocks, then hashes
# A block that expired is taken off the account.
TOUCH = (
    _NEXT_SCORE
    + """
for i = 2, #ARGV do
  if redis.call('EXISTS', ARGV[1] .. ARGV[i]) == 1 then
    redis.call('ZADD', KEYS[1], 'XX', next_score(), ARGV[i])
  else
    local cost = redis.call('HGET', KEYS[2], ARGV[i])
    if cost then
      redis.call('HDEL', KEYS[2], ARGV[i])
      redis.call('ZREM', KEYS[1], ARGV[i])
      redis.call('HINCRBY', KEYS[2], '', -cost)
    end
  end
end
"""
)
