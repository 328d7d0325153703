-- Asks for random services, COUNT of them, spread over all: every STEPth.
-- wrk ... -s hosts.lua URL -- COUNT STEP
local requests = {}

init = function(args)
  for i = 1, args[1] do
    requests[i] = wrk.format("GET", "/", {Host = string.format("svc%d", (i - 1) * args[2])})
  end
end

request = function()
  return requests[math.random(#requests)]
end

done = function(summary, latency)
  local e = summary.errors
  io.write(string.format("result %d %d %d %.3f\n", summary.requests, summary.duration,
    e.connect + e.read + e.write + e.status + e.timeout, latency:percentile(99) / 1000))
end
