"""Stubs generated from proto/ against a cluster on the demo model: grpc_client.py STUBS host:port"""

import sys
import unittest

SERVER = sys.argv.pop()
sys.path.insert(0, sys.argv.pop())

import grpc
from cohort.v1 import cohort_pb2 as cohort
from cohort.v1 import cohort_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from vllm import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

QUESTION = "What does `u128::saturating_add` do?"
ANSWER = "saturating at the numeric bounds instead of overflowing"


class Client(unittest.TestCase):
    def setUp(self) -> None:
        self.channel = grpc.insecure_channel(SERVER)
        self.addCleanup(self.channel.close)

    def request(self):
        return cohort.GenerateRequest(
            chat=cohort.ChatPrompt(messages=[cohort.ChatMessage(role="user", content=QUESTION)], reasoning=False),
            sampling=cohort.Sampling(temperature=0),
            response=cohort.Response(parse=True),
        )

    def test_an_answer_streams_and_comes_at_once(self):
        stub = cohort_pb2_grpc.CohortStub(self.channel)
        messages = list(stub.Generate(self.request()))
        self.assertIn(ANSWER, "".join(message.text for message in messages))
        self.assertEqual(messages[-1].finish.reason, cohort.FINISH_REASON_STOP)
        once = stub.GenerateOnce(self.request())
        self.assertEqual(once.text, "".join(message.text for message in messages))
        self.assertEqual(once.usage.output_tokens, len(once.token_ids))

    def test_tokens_there_and_back(self):
        stub = cohort_pb2_grpc.CohortStub(self.channel)
        ids = stub.Tokenize(cohort.TokenizeRequest(text="Grüße, 漢字!")).token_ids
        self.assertEqual(stub.Detokenize(cohort.DetokenizeRequest(token_ids=ids)).text, "Grüße, 漢字!")

    def test_a_wrong_field_is_named(self):
        stub = cohort_pb2_grpc.CohortStub(self.channel)
        request = self.request()
        request.sampling.top_p = 2
        with self.assertRaises(grpc.RpcError) as refused:
            stub.GenerateOnce(request)
        self.assertEqual(refused.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn("sampling.top_p", refused.exception.details())

    def test_vllms_api_streams_and_comes_at_once(self):
        stub = inference_pb2_grpc.InferenceStub(self.channel)
        request = inference_pb2.GenerateRequest(
            text="The trait Iterator",
            stopping=inference_pb2.StoppingCriteria(max_new_tokens=8),
            response=inference_pb2.ResponseOptions(output_token_ids=True, output_logprobs=True),
        )
        messages = list(stub.GenerateStream(request))
        self.assertTrue(messages[0].HasField("prompt_info"))
        outputs = [message.outputs for message in messages]
        once = stub.Generate(request).outputs
        self.assertEqual("".join(output.text for output in outputs), once.text)
        self.assertEqual([id for output in outputs for id in output.token_ids], list(once.token_ids))
        self.assertEqual(len(once.logprobs), 8)
        self.assertTrue(all(rank == 1 for rank in once.ranks))
        self.assertEqual(once.finish_info.finish_reason, inference_pb2.FinishInfo.LENGTH)

    def test_a_request_is_aborted_by_its_id(self):
        stub = inference_pb2_grpc.InferenceStub(self.channel)
        request = inference_pb2.GenerateRequest(
            request_id="to-be-aborted",
            text="The",
            stopping=inference_pb2.StoppingCriteria(max_new_tokens=1500, ignore_eos=True),
        )
        stream = stub.GenerateStream(request)
        next(stream)
        control = control_pb2_grpc.ControlStub(self.channel)
        control.Abort(control_pb2.AbortRequest(request_ids=["to-be-aborted"]))
        end = list(stream)[-1].outputs.finish_info
        self.assertEqual(end.finish_reason, inference_pb2.FinishInfo.ABORTED)
        control.Abort(control_pb2.AbortRequest(request_ids=["to-be-aborted"]))

    def test_the_server_describes_itself(self):
        control = control_pb2_grpc.ControlStub(self.channel)
        self.assertEqual(control.GetModelInfo(control_pb2.GetModelInfoRequest()).served_model_name, "cohort-demo")
        server = control.GetServerInfo(control_pb2.GetServerInfoRequest())
        self.assertEqual(server.parallelism.tensor_parallel_size, 2)
        services = ProtoReflectionDescriptorDatabase(self.channel).get_services()
        health = health_pb2_grpc.HealthStub(self.channel)
        for name in ("cohort.v1.Cohort", "vllm.Inference", "vllm.Control"):
            self.assertIn(name, services)
            status = health.Check(health_pb2.HealthCheckRequest(service=name)).status
            self.assertEqual(status, health_pb2.HealthCheckResponse.SERVING)


unittest.main()
