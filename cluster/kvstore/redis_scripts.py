"""What has to be atomic of leases, counters and records, in Lua; its effects are replicated.

They are sent with EVAL: the server compiles a text once and knows it again by its digest, while
EVALSHA would need a second round trip after every restart or SCRIPT FLUSH. All keys of a call have
one hash tag, so that a cluster runs them too. Numbers above 2**46 go through `%.0f`, because Lua
would write them with 14 digits. Those of journals are in redis_journal_scripts.py, those of blocks
in redis_block_scripts.py.
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

# KEYS counter   ARGV amount, most, ttl in ms   ->   sum
COUNT = """
local sum = tonumber(redis.call('GET', KEYS[1]) or '0') + tonumber(ARGV[1])
if ARGV[1] == '0' or sum > tonumber(ARGV[2]) then return sum end
redis.call('INCRBY', KEYS[1], ARGV[1])
if redis.call('PTTL', KEYS[1]) < 0 then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
return sum
"""

# The version of records is in their own hash, so that one is not lost without the other.

# KEYS records   ARGV key, value, next version, most records, 1: only if it is absent
# ->   kept, full or other: which another value under the key is
PUT_RECORD = """
local known = redis.call('HGET', KEYS[1], ARGV[1])
if known and ARGV[5] == '1' then return known == ARGV[2] and 'kept' or 'other' end
local count = redis.call('HLEN', KEYS[1]) - redis.call('HEXISTS', KEYS[1], '')
if not known and count >= tonumber(ARGV[4]) then return 'full' end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2], '', ARGV[3])
return 'kept'
"""

# KEYS records   ARGV key, next version
DROP_RECORD = """
if redis.call('HDEL', KEYS[1], ARGV[1]) == 1 then redis.call('HSET', KEYS[1], '', ARGV[2]) end
"""

# KEYS records   ARGV known version   ->   {version} where it is the known one, else {version, all}
LIST_RECORDS = """
local version = redis.call('HGET', KEYS[1], '') or ''
if version ~= '' and version == ARGV[1] then return {version} end
return {version, redis.call('HGETALL', KEYS[1])}
"""
