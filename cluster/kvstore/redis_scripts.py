"""What has to be atomic in Redis, in Lua; effects are replicated, time is the server's.

They are sent with EVAL: the server compiles a text once and knows it again by its digest, while
EVALSHA would need a second round trip after every restart or SCRIPT FLUSH. All keys of a call have
one hash tag, so that a cluster runs them too. Numbers above 2**46 go through `%.0f` or `%.17g`,
because Lua would write them with 14 digits.
"""

from __future__ import annotations

from cluster.kvstore.budget import BLOCK_OVERHEAD_BYTES
from cluster.kvstore.eviction import HALF_DEPTH_BLOCKS, MAX_USES

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

# The version of records is in their own hash, so that one is not lost without the other.

# KEYS records   ARGV key, value, next version, most records   ->   1 or 0
PUT_RECORD = """
local count = redis.call('HLEN', KEYS[1]) - redis.call('HEXISTS', KEYS[1], '')
if count >= tonumber(ARGV[4]) and redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2], '', ARGV[3])
return 1
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

# What the scripts of blocks begin with.
#   KEYS order   zset   blocks that may be evicted, by value (eviction.py)
#        pinned  zset   the others, by value
#        books   hash   block -> cost, uses, position, is_pinned; '' -> the four sums below
#   ARGV prefix of blocks, ttl in ms, budget
#
# They may run where Redis has reached its maxmemory: they free more than they take. A block's value
# itself is written by SET, which may not.
_BLOCKS = (
    f"""#!lua flags=allow-oom
local order, pinned, books, prefix = KEYS[1], KEYS[2], KEYS[3], ARGV[1]
local ttl, budget = ARGV[2], tonumber(ARGV[3])
local used, held, age, evicted = string.match(
  redis.call('HGET', books, '') or '0 0 0 0', '^(%S+) (%S+) (%S+) (%S+)$')
used, held, age, evicted = tonumber(used), tonumber(held), tonumber(age), tonumber(evicted)

local function value_of(uses, position)
  return string.format('%.17g', age + uses - position / (position + {HALF_DEPTH_BLOCKS}))
end
"""
    + """
local function entry_of(block)
  local entry = redis.call('HGET', books, block)
  if entry then return struct.unpack('>I4BHB', entry) end
end

local function forget(block)
  local cost, uses, position, is_pinned = entry_of(block)
  if not cost then return 0, 0 end
  redis.call('HDEL', books, block)
  redis.call('ZREM', is_pinned == 1 and pinned or order, block)
  used = used - cost
  if is_pinned == 1 then held = held - cost end
  return uses, is_pinned
end

local function remember(block, cost, uses, position, is_pinned)
  redis.call('HSET', books, block, struct.pack('>I4BHB', cost, uses, position, is_pinned))
  redis.call('ZADD', is_pinned == 1 and pinned or order, value_of(uses, position), block)
  if is_pinned == 1 then
    redis.call('PERSIST', prefix .. block)
  end
end

local function may_pin(cost) return held + cost <= budget / 2 end

local function make_room(cost)
  while used + cost > budget do
    local victim = redis.call('ZPOPMIN', order)
    if not victim[1] then return false end
    forget(victim[1])
    redis.call('UNLINK', prefix .. victim[1])
    age, evicted = tonumber(victim[2]), evicted + 1
  end
  return true
end

-- Where one of the three keys was lost, what the others know is dropped: the sums are wrong now.
local function heal()
  local num_sums = redis.call('HEXISTS', books, '')
  local num_ordered = redis.call('ZCARD', order) + redis.call('ZCARD', pinned)
  if redis.call('HLEN', books) - num_sums == num_ordered and (num_sums == 1 or num_ordered == 0)
  then return end
  for _, key in ipairs({order, pinned}) do
    for _, block in ipairs(redis.call('ZRANGE', key, 0, -1)) do
      redis.call('UNLINK', prefix .. block)
    end
  end
  for _, block in ipairs(redis.call('HKEYS', books)) do
    redis.call('UNLINK', prefix .. block)
  end
  redis.call('DEL', order, pinned, books)
  used, held, age, evicted = 0, 0, 0, 0
end

-- Pinned blocks stay until they are released, and so do the books; else all ends with the last TTL.
local function close_books()
  redis.call('HSET', books, '', string.format('%.0f %.0f %.17g %.0f', used, held, age, evicted))
  local lasting = redis.call('EXISTS', pinned) == 1
  for _, key in ipairs({order, books}) do
    if lasting then redis.call('PERSIST', key) else redis.call('PEXPIRE', key, ttl) end
  end
end
"""
)

# ARGV ... wants pin (0 or 1), then (block, cost, position) of each, written already   ->   1 or 0
# The room that a block needs comes from others than this call's, which are added at the end.
ADMIT_BLOCKS = (
    _BLOCKS
    + f"""
heal()
local before, added, added_cost, is_stored = {{}}, {{}}, 0, {{}}
for i = 5, #ARGV, 3 do before[ARGV[i]] = {{forget(ARGV[i])}} end
for i = 5, #ARGV, 3 do
  local block, cost, position = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local uses, was_pinned = unpack(before[block])
  local pins = (was_pinned == 1 or ARGV[4] == '1') and may_pin(cost)
  local fits = cost <= budget - held - added_cost
  -- Absent: it was among the blocks that heal dropped.
  if fits and redis.call('EXISTS', prefix .. block) == 1 and make_room(cost) then
    used = used + cost
    if pins then held = held + cost else added_cost = added_cost + cost end
    added[#added + 1] = {{block, cost, math.min(uses + 1, {MAX_USES}), position, pins and 1 or 0}}
    is_stored[#is_stored + 1] = 1
  else
    redis.call('UNLINK', prefix .. block)
    is_stored[#is_stored + 1] = 0
  end
end
for _, entry in ipairs(added) do remember(unpack(entry)) end
close_books()
return is_stored
"""
)

# ARGV ... wants pin (0 or 1), then blocks   ->   1 or 0 for each: it is there
# A block that is gone is taken off the books. One that the books have lost comes back to them with
# a cost that is too high rather than too low.
TOUCH_BLOCKS = (
    _BLOCKS
    + f"""
heal()
local entries, scores, lost, is_there = {{}}, {{}}, {{}}, {{}}
local known = redis.call('HMGET', books, unpack(ARGV, 5))
for i = 5, #ARGV do
  local block, entry = ARGV[i], known[i - 4]
  local name, cost, uses, position, is_pinned = prefix .. block, nil, 0, 0, 0
  if entry then cost, uses, position, is_pinned = struct.unpack('>I4BHB', entry) end
  local there
  if is_pinned == 1 then
    there = redis.call('EXISTS', name)
  else
    there = redis.call('PEXPIRE', name, ttl)
  end
  if there == 0 then
    forget(block)
  elseif not cost then
    lost[#lost + 1] = block
  else
    uses = math.min(uses + 1, {MAX_USES})
    if ARGV[4] == '1' or is_pinned == 1 then
      if is_pinned == 0 and may_pin(cost) then
        redis.call('ZREM', order, block)
        held, is_pinned = held + cost, 1
      end
      remember(block, cost, uses, position, is_pinned)
    else
      entries[#entries + 1] = block
      entries[#entries + 1] = struct.pack('>I4BHB', cost, uses, position, 0)
      scores[#scores + 1] = value_of(uses, position)
      scores[#scores + 1] = block
    end
  end
  is_there[#is_there + 1] = there
end
if #entries > 0 then  -- the usual case, in one command each
  redis.call('HSET', books, unpack(entries))
  redis.call('ZADD', order, unpack(scores))
end
for _, block in ipairs(lost) do
  local cost = math.ceil(redis.call('STRLEN', prefix .. block) * 1.25) + {BLOCK_OVERHEAD_BYTES}
  make_room(cost)
  used = used + cost
  remember(block, cost, 1, 0, 0)
end
close_books()
return is_there
"""
)

# ARGV ..., then blocks
UNPIN_BLOCKS = (
    _BLOCKS
    + """
heal()
for i = 4, #ARGV do
  local cost, uses, position, is_pinned = entry_of(ARGV[i])
  if is_pinned == 1 then
    redis.call('ZREM', pinned, ARGV[i])
    redis.call('PEXPIRE', prefix .. ARGV[i], ttl)
    held = held - cost
    remember(ARGV[i], cost, uses, position, 0)
  end
end
close_books()
"""
)

# ARGV ..., bytes   Evicts what counts as many bytes, when Redis itself has no memory left.
SHRINK = (
    _BLOCKS
    + """
heal()
make_room(budget - used + tonumber(ARGV[4]))
close_books()
"""
)

# ARGV ..., most blocks   ->   how many were dropped; fewer than asked for: it is empty
FLUSH_BLOCKS = (
    _BLOCKS
    + """
local most, dropped = tonumber(ARGV[4]), 0
for _, key in ipairs({order, pinned}) do
  local popped = redis.call('ZPOPMIN', key, most - dropped)
  for i = 1, #popped, 2 do
    forget(popped[i])
    redis.call('UNLINK', prefix .. popped[i])
    dropped = dropped + 1
  end
  if dropped == most then break end
end
if dropped == most then close_books() else redis.call('DEL', books) end
return dropped
"""
)

# ->   {sums, number of blocks, number of pinned ones}
BLOCK_STATS = """
local pinned = redis.call('ZCARD', KEYS[2])
return {redis.call('HGET', KEYS[3], '') or '0 0 0 0', redis.call('ZCARD', KEYS[1]) + pinned, pinned}
"""
