import torch
from spmd import *
import torch.distributed as dist
def test_dbg():
    model = network(); single = twin(model)
    tokens, target = batch()
    shard(model)
    base = base_shards(model)
    def P(*a): 
        if dist.get_rank()==0: print(*a, flush=True)
    for c in range(2):
        train(model, mine(tokens), mine(target), steps=2)
        train(single, tokens, target, steps=2)
        d={}
        for (n, a), (_, b) in zip(model.named_parameters(), single.named_parameters()):
            d[n]=(whole(a.detach())-b).abs().max().item()
        P(c,'trained', max(d.values()))
        with torch.no_grad():
            exp = single(tokens)
            model.eval()
            P(c, (model(tokens)-exp).abs().max(), (model(tokens)-exp).abs().max())
            model.train()
            P((model(tokens)-exp).abs().max())
        now = base_shards(model)
        P([ (k, torch.equal(now[k],v)) for k,v in base.items()])
