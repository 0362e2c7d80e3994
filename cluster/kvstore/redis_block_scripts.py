"""What has to be atomic of blocks, in Lua: counting, evicting, pinning, healing.

    blocks   {prefix}block:KEY    what is stored, each with its TTL
    order    zset    those that may be evicted, by value (eviction.py)
    pinned   zset    the others, by when their pins end: whole milliseconds since 1970; the fraction
                     puts heads of chains above tails
    books    hash    block -> cost, uses, position, is_pinned; '' -> used, held, age, evicted
    graves   list    names of what was `order`, `pinned` or `books` of a shard that lost another one

A pin is a lease: who wants a block to stay pins it again before the TTL is over. One that is not
pinned again becomes a block like others, or has expired with its TTL.

Every script first checks that the three indexes fit each other. Where one was lost or cannot be
read, the sums are wrong and cannot be had at once: the rest is renamed, and the shard begins with
empty books. Later calls drop a bounded number each of what lies in graves; what is asked for before
that comes back to the books. Types and entries that cannot be read are as absent.

The scripts may run where Redis has reached its maxmemory: they free more than they take. A block's
value itself is written by SET, which may not. How they are sent is told in redis_scripts.py.
"""

from __future__ import annotations

from cluster.kvstore.budget import BLOCK_OVERHEAD_BYTES
from cluster.kvstore.eviction import HALF_DEPTH_BLOCKS, MAX_USES

_END_PINS = 64  # that one script looks at: no other client waits longer than that takes
_DROP_GRAVES = 512  # more than a call writes: what lies in graves is not counted in the budget

# KEYS order, pinned, books, graves   ARGV prefix of blocks, ttl in ms, budget
_BEGIN = (
    """#!lua flags=allow-oom
local order, pinned, books, graves, prefix = KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1]
local ttl, budget = tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function drop_other_types()
  for i, wanted in ipairs({'zset', 'zset', 'hash', 'list'}) do
    local found = redis.call('TYPE', KEYS[i]).ok
    if found ~= wanted and found ~= 'none' then redis.call('UNLINK', KEYS[i]) end
  end
end
drop_other_types()

local function parse_sums()
  local used, held, age, evicted = string.match(
    redis.call('HGET', books, '') or '', '^(%S+) (%S+) (%S+) (%S+)$')
  return tonumber(used or ''), tonumber(held or ''), tonumber(age or ''), tonumber(evicted or '')
end
local used, held, age, evicted = parse_sums()

local num_buried = 0

-- Begin with empty books; what the old ones know is dropped bit by bit.
local function bury()
  for i = 1, 3 do
    if redis.call('EXISTS', KEYS[i]) == 1 then
      num_buried = num_buried + 1
      local grave = graves .. ':' .. time[1] .. '.' .. time[2] .. '.' .. num_buried
      redis.call('RENAME', KEYS[i], grave)
      redis.call('PEXPIRE', grave, ttl)
      redis.call('RPUSH', graves, grave)
    end
  end
  used, held, age, evicted = 0, 0, 0, 0
end

-- Where one of the three keys was lost, the sums are wrong.
local function heal()
  local has_sums = used and held and age and evicted
  local num_entries = redis.call('HLEN', books) - redis.call('HEXISTS', books, '')
  local num_ordered = redis.call('ZCARD', order) + redis.call('ZCARD', pinned)
  if not has_sums or num_entries ~= num_ordered then bury() end
end
heal()
"""
    + f"""
local function value_of(uses, position)
  return string.format('%.17g', age + uses - position / (position + {HALF_DEPTH_BLOCKS}))
end

-- 41 bits of milliseconds and 12 of the place are what a score holds exactly.
local function pin_until(position)
  return string.format('%.17g', now + ttl + (4095 - math.min(position, 4095)) / 4096)
end
"""
    + """
local function unpacked(entry)
  if entry and #entry == 8 then return struct.unpack('>I4BHB', entry) end
end

local function forget(block)
  local entry = redis.call('HGET', books, block)
  if not entry then return 0 end
  local cost, uses, position, is_pinned = unpacked(entry)
  redis.call('HDEL', books, block)
  if cost then used = used - cost end
  if is_pinned == 1 then
    local pin = redis.call('ZSCORE', pinned, block)
    redis.call('ZREM', pinned, block)
    held = held - cost
    return uses, pin
  end
  redis.call('ZREM', order, block)
  if not cost then redis.call('ZREM', pinned, block) end
  return uses or 0
end

local function remember(block, cost, uses, position, pin)
  redis.call('HSET', books, block, struct.pack('>I4BHB', cost, uses, position, pin and 1 or 0))
  redis.call('ZADD', pin and pinned or order, pin or value_of(uses, position), block)
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

local function unpin(block)
  local cost, uses, position, is_pinned = unpacked(redis.call('HGET', books, block))
  if is_pinned == 1 then
    redis.call('ZREM', pinned, block)
    held = held - cost
    remember(block, cost, uses, position)
    return true
  end
end

-- What was used lately goes on without its pin, the rest has expired.
local function end_pins(most)
  local ended = redis.call(
    'ZRANGEBYSCORE', pinned, '-inf', string.format('(%.0f', now), 'LIMIT', 0, most)
  for _, block in ipairs(ended) do
    if redis.call('EXISTS', prefix .. block) == 1 then unpin(block) else forget(block) end
    redis.call('ZREM', pinned, block)  -- also where the entry cannot be read
  end
end

-- Return how many were looked at, and how many were there.
local function drop_graves(most)
  local seen, dropped = 0, 0
  while seen < most do
    local grave = redis.call('LINDEX', graves, 0)
    if not grave then break end
    local blocks = {}
    if redis.call('TYPE', grave).ok == 'hash' then
      blocks = redis.call('HRANDFIELD', grave, most - seen)
      redis.call('HDEL', grave, unpack(blocks))
    else
      local popped = redis.call('ZPOPMIN', grave, most - seen)
      for i = 1, #popped, 2 do blocks[#blocks + 1] = popped[i] end
    end
    for _, block in ipairs(blocks) do
      if redis.call('HEXISTS', books, block) == 0 then
        dropped = dropped + redis.call('UNLINK', prefix .. block)
      end
    end
    seen = seen + #blocks
    if redis.call('EXISTS', grave) == 0 then redis.call('LPOP', graves) end
  end
  return seen, dropped
end

-- All ends with the last TTL.
local function write_sums()
  redis.call('HSET', books, '', string.format('%.0f %.0f %.17g %.0f', used, held, age, evicted))
  for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ttl) end
end

local function close_books()
"""
    + f"""  drop_graves({_DROP_GRAVES})
  write_sums()
end

end_pins({_END_PINS})
"""
)

# ARGV ... wants pin (0 or 1), then (block, cost, position) of each, written already   ->   1 or 0
# The room that a block needs comes from others than this call's, which are added at the end.
ADMIT_BLOCKS = (
    _BEGIN
    + f"""
local before, added, added_cost, is_stored = {{}}, {{}}, 0, {{}}
for i = 5, #ARGV, 3 do before[ARGV[i]] = {{forget(ARGV[i])}} end
for i = 5, #ARGV, 3 do
  local block, cost, position = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local uses, pin = unpack(before[block])
  if ARGV[4] == '1' then pin = pin_until(position) end
  if not may_pin(cost) then pin = nil end
  if cost <= budget - held - added_cost and make_room(cost) then
    used = used + cost
    if pin then held = held + cost else added_cost = added_cost + cost end
    added[#added + 1] = {{block, cost, math.min(uses + 1, {MAX_USES}), position, pin}}
    is_stored[#is_stored + 1] = 1
  else
    redis.call('UNLINK', prefix .. block)
    is_stored[#is_stored + 1] = 0
  end
end
for _, entry in ipairs(added) do remember(unpack(entry, 1, 5)) end
close_books()
return is_stored
"""
)

# ARGV ... wants pin (0 or 1), then blocks   ->   1 or 0 for each: it is there
# A block that is gone is taken off the books. One that the books have lost comes back to them with
# a cost that is too high rather than too low.
TOUCH_BLOCKS = (
    _BEGIN
    + f"""
local entries, scores, pins, lost, is_there = {{}}, {{}}, {{}}, {{}}, {{}}
local known = redis.call('HMGET', books, unpack(ARGV, 5))
for i = 5, #ARGV do
  local block = ARGV[i]
  local cost, uses, position, is_pinned = unpacked(known[i - 4])
  local there = redis.call('PEXPIRE', prefix .. block, ttl)
  if there == 0 then
    forget(block)
  elseif not cost then
    forget(block)
    lost[#lost + 1] = block
  else
    uses = math.min(uses + 1, {MAX_USES})
    if ARGV[4] == '1' and (is_pinned == 1 or may_pin(cost)) then
      if is_pinned ~= 1 then
        redis.call('ZREM', order, block)
        held, is_pinned = held + cost, 1
      end
      pins[#pins + 1] = pin_until(position)
      pins[#pins + 1] = block
    elseif is_pinned ~= 1 then
      scores[#scores + 1] = value_of(uses, position)
      scores[#scores + 1] = block
    end
    entries[#entries + 1] = block
    entries[#entries + 1] = struct.pack('>I4BHB', cost, uses, position, is_pinned)
  end
  is_there[#is_there + 1] = there
end
-- The usual case, in one command each.
if #entries > 0 then redis.call('HSET', books, unpack(entries)) end
if #scores > 0 then redis.call('ZADD', order, unpack(scores)) end
if #pins > 0 then redis.call('ZADD', pinned, unpack(pins)) end
for _, block in ipairs(lost) do
  local length = redis.call('TYPE', prefix .. block).ok == 'string'
    and redis.call('STRLEN', prefix .. block) or 0
  local cost = math.ceil(length * 1.25) + {BLOCK_OVERHEAD_BYTES}
  make_room(cost)
  used = used + cost
  remember(block, cost, 1, 0)
end
close_books()
return is_there
"""
)

# ARGV ..., then blocks
UNPIN_BLOCKS = (
    _BEGIN
    + """
for i = 4, #ARGV do
  if unpin(ARGV[i]) then redis.call('PEXPIRE', prefix .. ARGV[i], ttl) end
end
close_books()
"""
)

# ARGV ..., bytes   Evicts what counts as many bytes, when Redis itself has no memory left.
SHRINK = (
    _BEGIN
    + """
make_room(budget - used + tonumber(ARGV[4]))
close_books()
"""
)

# ARGV ..., most blocks   ->   {how many were dropped, 1: there may be more}
FLUSH_BLOCKS = (
    _BEGIN
    + """
local most, seen, dropped = tonumber(ARGV[4]), 0, 0
for _, key in ipairs({order, pinned}) do
  if seen == most then break end
  local popped = redis.call('ZPOPMIN', key, most - seen)
  for i = 1, #popped, 2 do
    forget(popped[i])
    dropped = dropped + redis.call('UNLINK', prefix .. popped[i])
  end
  seen = seen + #popped / 2
end
if seen < most then bury() end  -- what the books alone know
local seen_graves, dropped_graves = drop_graves(most - seen)
seen, dropped = seen + seen_graves, dropped + dropped_graves
if seen == most then write_sums() end
return {dropped, seen == most and 1 or 0}
"""
)

# KEYS as above   ->   {bytes, number of blocks, pinned ones, evicted ones}; changes nothing
BLOCK_STATS = """
local function read(kind, key, command, ...)
  return redis.call('TYPE', key).ok == kind and redis.call(command, key, ...) or nil
end
local now = redis.call('TIME')[1] .. '000'
local pinned = read('zset', KEYS[2], 'ZCARD') or 0
local held = read('zset', KEYS[2], 'ZCOUNT', now, '+inf') or 0
local used, evicted = string.match(read('hash', KEYS[3], 'HGET', '') or '', '^(%d+) .* (%d+)$')
local num_blocks = (read('zset', KEYS[1], 'ZCARD') or 0) + pinned
return {tonumber(used or '0'), num_blocks, held, tonumber(evicted or '0')}
"""
