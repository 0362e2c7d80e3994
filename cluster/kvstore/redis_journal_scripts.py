"""What has to be atomic of journals, in Lua: who may write, counting, making room, healing.

    journals         {prefix}KEY   list, PX   scope, owner, live or ended, then the entries
    journals:order   zset          keys by their last touch; ended ones below all others
    journals:books   hash          key -> cost; '' -> sum of costs, last touch

All are on one node of a cluster: sums over several could not be exact. A touch is a number that
grows with each, microseconds since 1970 where the clock allows it, so the order is that of expiry,
too: what has expired is found at its two heads.

Where order or books were lost or cannot be read, both begin anew. A journal comes back to them with
its next write; the others go with their TTL and are not counted until then. What cannot be read as
a journal is dropped when it is to be written to. How scripts are sent is told in redis_scripts.py.
"""

from __future__ import annotations

from cluster.kvstore.budget import ENTRY_OVERHEAD_BYTES, JOURNAL_OVERHEAD_BYTES

MAX_SCRIPT_WRITES = 64  # of one script: no other client waits longer than these take
_MAX_SWEPT = MAX_SCRIPT_WRITES  # expired journals of either kind; as many as a script can add

# KEYS order, books   ARGV prefix of journals, ttl in ms, budget
_BEGIN = (
    """
local order, books, prefix = KEYS[1], KEYS[2], ARGV[1]
local ttl, budget = tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local live = 2 ^ 52  -- added to the touches of those that have not ended

for i, wanted in ipairs({'zset', 'hash'}) do
  local found = redis.call('TYPE', KEYS[i]).ok
  if found ~= wanted and found ~= 'none' then redis.call('UNLINK', KEYS[i]) end
end

local sums = redis.call('HGET', books, '') or ''
local used, touch = string.match(sums, '^(%d+) (%d+)$')
used, touch = tonumber(used or ''), tonumber(touch or '')
local num_counted = redis.call('HLEN', books) - redis.call('HEXISTS', books, '')
if not used or num_counted ~= redis.call('ZCARD', order) then
  -- Only where there is something: a write, if of nothing, would let the rest pass a full memory.
  if redis.call('EXISTS', order, books) > 0 then redis.call('UNLINK', order, books) end
  used, touch = 0, 0
end

local function counted(key) return tonumber(redis.call('HGET', books, key) or '') or 0 end

local function forget(key)
  used = used - counted(key)
  redis.call('HDEL', books, key)
  redis.call('ZREM', order, key)
end

local function count(key, cost, state)
  touch = math.max(now, touch + 1)
  used = used - counted(key) + cost
  redis.call('HSET', books, key, cost)
  local place = touch + (state == 'live' and live or 0)
  redis.call('ZADD', order, string.format('%.0f', place), key)
end

-- Return scope, owner and state of a journal; nothing where there is none.
local function find(key)
  local found = redis.pcall('LRANGE', prefix .. key, 0, 2)
  if found[3] then return unpack(found) end
  if redis.call('EXISTS', prefix .. key) == 1 then redis.call('UNLINK', prefix .. key) end
end

local function sweep(lowest, highest, most)
  local oldest = redis.call('ZRANGEBYSCORE', order, lowest, highest, 'LIMIT', 0, most)
  for _, key in ipairs(oldest) do
    if redis.call('EXISTS', prefix .. key) == 1 then break end
    forget(key)
  end
end
"""
    + f"""
sweep('-inf', string.format('%.0f', live), {_MAX_SWEPT})
sweep(string.format('%.0f', live), '+inf', {_MAX_SWEPT})
"""
    + """
local function close_books()
  redis.call('HSET', books, '', string.format('%.0f %.0f', used, touch))
  redis.call('PEXPIRE', books, ttl)
  redis.call('PEXPIRE', order, ttl)
end
"""
)

# ARGV ..., then of each write: key, scope, owner, 1: it begins, 1: it ends, number of entries, they
# ->   {dropped ended ones, dropped live ones, outcome of each write, ...}
WRITE_JOURNALS = (
    _BEGIN
    + f"""
local function cost_of_entries(entries, first, last)
  local cost = 0
  for i = first, last do cost = cost + #entries[i] + {ENTRY_OVERHEAD_BYTES} end
  return cost
end

-- Of one that is there; the books may have lost it.
local function cost_of(key)
  local cost = counted(key)
  if cost > 0 then return cost end
  local entries = redis.call('LRANGE', prefix .. key, 3, -1)
  return {JOURNAL_OVERHEAD_BYTES} + cost_of_entries(entries, 1, #entries)
end
"""
    + """
local reply = {0, 0}

local function make_room(key, cost)
  while used - counted(key) + cost > budget do
    local lowest = redis.call('ZRANGE', order, 0, 1)
    local victim = lowest[1] ~= key and lowest[1] or lowest[2]
    if not victim then  -- somebody else has changed the sum
      used = counted(key)
      return
    end
    local kind = tonumber(redis.call('ZSCORE', order, victim)) < live and 1 or 2
    reply[kind] = reply[kind] + redis.call('UNLINK', prefix .. victim)
    forget(victim)
  end
end

local function append(key, first, last)
  for start = first, last, 1000 do
    redis.call('RPUSH', prefix .. key, unpack(ARGV, start, math.min(start + 999, last)))
  end
end

local function write(key, scope, owner, begins, ends, first, last)
  local known_scope, known_owner, state = find(key)
  if known_scope and known_scope ~= scope then return 'foreign' end
  if begins and known_scope and last >= first then  -- maybe a second time
    begins = redis.call('LINDEX', prefix .. key, 3) ~= ARGV[first]
  end
  if not begins and not known_scope then return 'gone' end
  if not begins and known_owner ~= owner then return 'lost' end
"""
    + f"""
  local cost = begins and {JOURNAL_OVERHEAD_BYTES} or cost_of(key)
  cost = cost + cost_of_entries(ARGV, first, last)
"""
    + """
  if cost > budget then return 'full' end
  make_room(key, cost)
  if begins then
    if known_scope then redis.call('UNLINK', prefix .. key) end
    state = 'live'
    redis.call('RPUSH', prefix .. key, scope, owner, state)
  end
  append(key, first, last)
  if ends then
    state = 'ended'
    redis.call('LSET', prefix .. key, 2, state)
  end
  redis.call('PEXPIRE', prefix .. key, ttl)
  count(key, cost, state)
  return 'written'
end

local i = 4
while ARGV[i] do
  local first = i + 6
  local last = first + tonumber(ARGV[i + 5]) - 1
  reply[#reply + 1] = write(
    ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3] == '1', ARGV[i + 4] == '1', first, last)
  i = last + 1
end
close_books()
return reply
"""
)

# ARGV ..., key, scope, owner   ->   the journal's list as it is then; empty where there is none
CLAIM_JOURNAL = (
    _BEGIN
    + """
local key, scope, owner = ARGV[4], ARGV[5], ARGV[6]
local known_scope, _, state = find(key)
if known_scope == scope then
  redis.call('LSET', prefix .. key, 1, owner)
  redis.call('PEXPIRE', prefix .. key, ttl)
  local cost = counted(key)
  if cost > 0 then count(key, cost, state) end
end
close_books()
return known_scope and redis.call('LRANGE', prefix .. key, 0, -1) or {}
"""
)
